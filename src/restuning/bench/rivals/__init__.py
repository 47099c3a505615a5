"""Rivals that are no plan of tuners, on a copy of the backbone, each with its published defaults."""

from restuning.bench.rivals.table import RIVALS as RIVALS
from restuning.bench.rivals.table import Rival as Rival
from restuning.bench.rivals.table import build as build
from restuning.bench.rivals.table import check as check
