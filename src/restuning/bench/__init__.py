"""Grids of tasks, methods and seeds under one protocol, and reports about them."""

from restuning.bench.bench import Bench as Bench
from restuning.bench.folder import open_grid as open_grid
from restuning.bench.folder import read_protocol as read_protocol
from restuning.bench.folder import read_result as read_result
from restuning.bench.folder import read_results as read_results
from restuning.bench.folder import result_file as result_file
from restuning.bench.grid import Entry as Entry
from restuning.bench.grid import GridProtocol as GridProtocol
from restuning.bench.grid import GridRun as GridRun
from restuning.bench.grid import list_runs as list_runs
from restuning.bench.grid import parse_choices as parse_choices
from restuning.bench.grid import parse_entries as parse_entries
from restuning.bench.on_ray import run_grid_on_ray as run_grid_on_ray
from restuning.bench.runner import Event as Event
from restuning.bench.runner import Job as Job
from restuning.bench.runner import run_grid as run_grid
from restuning.bench.suites import SuiteTask as SuiteTask
from restuning.bench.suites import find_tasks as find_tasks
