"""The named methods as plans: `build("res-tuning", host, num_classes=100)` gives a task."""

from restuning.methods.method import PAPER as PAPER
from restuning.methods.method import RANK as RANK
from restuning.methods.method import Method as Method
from restuning.methods.method import Options as Options
from restuning.methods.method import new_head as new_head
from restuning.methods.named import METHODS as METHODS
from restuning.methods.named import build as build
from restuning.methods.named import check as check
from restuning.methods.named import check_values as check_values
from restuning.methods.named import count_parameters as count_parameters
from restuning.methods.named import is_solved as is_solved
from restuning.methods.named import keep_used as keep_used
from restuning.methods.named import names as names
from restuning.methods.named import refuse_unused as refuse_unused
from restuning.methods.named import runs_inside as runs_inside
from restuning.methods.named import table as table
