"""Configs of MMDetection: reading them, building their models, switching their norms."""
