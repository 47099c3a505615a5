"""What training will take, found from shapes alone: memory, time, stores, and what to choose."""

from restuning.forecast.methods import OnTaps as OnTaps
from restuning.forecast.methods import build_task as build_task
from restuning.forecast.methods import forecast_task as forecast_task
from restuning.forecast.methods import load_drawn as load_drawn
from restuning.forecast.methods import load_shapes as load_shapes
from restuning.forecast.methods import storable as storable
from restuning.forecast.methods import store_bytes as store_bytes
from restuning.forecast.methods import tap_shapes as tap_shapes
from restuning.forecast.rates import Rates as Rates
from restuning.forecast.rates import measure_rates as measure_rates
from restuning.forecast.step import Cost as Cost
from restuning.forecast.step import StepForecast as StepForecast
from restuning.forecast.step import call as call
from restuning.forecast.step import forecast_forward as forecast_forward
from restuning.forecast.step import forecast_step as forecast_step
from restuning.forecast.step import positional as positional
