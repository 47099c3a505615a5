"""`auto`: a method and its settings, chosen on validation within a budget of memory and time."""

from restuning.search.auto import AUTO as AUTO
from restuning.search.auto import Choice as Choice
from restuning.search.auto import choose_method as choose_method
from restuning.search.budget import Budget as Budget
from restuning.search.budget import format_bytes as format_bytes
from restuning.search.candidates import CANDIDATES as CANDIDATES
from restuning.search.candidates import Candidate as Candidate
from restuning.search.columns import Columns as Columns
from restuning.search.comparison import Comparison as Comparison
from restuning.search.train import TrainOptions as TrainOptions
