"""`auto`: a method and its settings, chosen on validation within a budget of memory and time."""

from restuning.choose.budget import Budget as Budget
from restuning.choose.budget import bytes_in_words as bytes_in_words
from restuning.choose.candidates import CANDIDATES as CANDIDATES
from restuning.choose.candidates import Candidate as Candidate
from restuning.choose.choice import AUTO as AUTO
from restuning.choose.choice import Choice as Choice
from restuning.choose.choice import choose as choose
from restuning.choose.feed import Feed as Feed
from restuning.choose.feed import feed_of as feed_of
