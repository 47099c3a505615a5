"""`bench report`: tables, plots and one page, all from the JSON of a grid."""

from restuning.bench.report.page import write_report as write_report
from restuning.bench.report.statistics import critical_difference as critical_difference
from restuning.bench.report.statistics import mean_ranks as mean_ranks
from restuning.bench.report.statistics import paired_bootstrap as paired_bootstrap
from restuning.bench.report.summary import Summary as Summary
from restuning.bench.report.summary import summarise as summarise
from restuning.bench.report.tables import published_tables as published_tables
from restuning.bench.report.tables import read_published as read_published
