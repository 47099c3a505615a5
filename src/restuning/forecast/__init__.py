"""What training will take, found from shapes alone: memory, time, stores, and what to choose."""

from restuning.forecast.beside import Run as Run
from restuning.forecast.beside import forecast_run as forecast_run
from restuning.forecast.budget import Option as Option
from restuning.forecast.budget import Recommendation as Recommendation
from restuning.forecast.budget import largest_batch as largest_batch
from restuning.forecast.budget import parse_bytes as parse_bytes
from restuning.forecast.budget import recommend as recommend
from restuning.forecast.grid import BankRates as BankRates
from restuning.forecast.grid import GridForecast as GridForecast
from restuning.forecast.grid import forecast_grid as forecast_grid
from restuning.forecast.methods import OnTaps as OnTaps
from restuning.forecast.methods import forecast_task as forecast_task
from restuning.forecast.methods import load_drawn as load_drawn
from restuning.forecast.methods import load_shapes as load_shapes
from restuning.forecast.methods import storable as storable
from restuning.forecast.methods import store_bytes as store_bytes
from restuning.forecast.methods import tap_shapes as tap_shapes
from restuning.forecast.rates import Rates as Rates
from restuning.forecast.rates import measure_rates as measure_rates
from restuning.forecast.shapes import AbsentWeights as AbsentWeights
from restuning.forecast.step import Cost as Cost
from restuning.forecast.step import StepForecast as StepForecast
from restuning.forecast.step import call as call
from restuning.forecast.step import forecast_forward as forecast_forward
from restuning.forecast.step import forecast_step as forecast_step
from restuning.forecast.step import positional as positional
