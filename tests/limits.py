"""When to take a process for hanging: a busy machine may take long over little."""

HANG = 1200  # seconds
