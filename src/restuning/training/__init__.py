"""Training: one loop that survives being killed, and evaluation."""

from restuning.problems.reliability import calibration_error as calibration_error
from restuning.training.calibrate import Calibration as Calibration
from restuning.training.calibrate import calibrate as calibrate
from restuning.training.calibrate import fit_temperature as fit_temperature
from restuning.training.callbacks import BestCheckpoint as BestCheckpoint
from restuning.training.callbacks import Callback as Callback
from restuning.training.callbacks import EarlyStopping as EarlyStopping
from restuning.training.callbacks import Record as Record
from restuning.training.evaluate import evaluate as evaluate
from restuning.training.evaluate_task import evaluate_task as evaluate_task
from restuning.training.fit import fit as fit
from restuning.training.fit import fit_until as fit_until
from restuning.training.log import draw_curves as draw_curves
from restuning.training.memory import PeakMemory as PeakMemory
from restuning.training.optimiser import build_optimiser as build_optimiser
from restuning.training.optimiser import learning_rate as learning_rate
from restuning.training.optimiser import parameter_groups as parameter_groups
from restuning.training.prepare import prepare as prepare
from restuning.training.settings import FitSettings as FitSettings
from restuning.training.supervised import FitResult as FitResult
