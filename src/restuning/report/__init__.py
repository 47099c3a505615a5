"""The report of a run: one HTML file that needs nothing else, made of plain records."""

from restuning.report.page import Curve as Curve
from restuning.report.page import Page as Page
from restuning.report.page import Shown as Shown
from restuning.report.page import render as render
from restuning.report.words import find_word as find_word
