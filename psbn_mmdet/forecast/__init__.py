"""What psBN can do in a training, before it begins: which closed filters open, and when."""

from .config import forecast_of_config
from .course import Course, Part, course_of
from .forecast import Forecast, make_forecast
from .schedule import courses

__all__ = [
    'Course',
    'Forecast',
    'Part',
    'course_of',
    'courses',
    'forecast_of_config',
    'make_forecast',
]
