"""Tuners: small trainable modules `x -> delta`, knowing a width and nothing else.

A new tuner is one file here and one import line below; the law tests then run over it.
"""

from restuning.tuners._base import Tuner as Tuner
from restuning.tuners._base import from_json as from_json
from restuning.tuners._base import from_spec as from_spec
from restuning.tuners._base import kinds as kinds
from restuning.tuners._base import to_json as to_json
from restuning.tuners._base import trait as trait
from restuning.tuners._base import tuner as tuner
from restuning.tuners.adapter import ResAdapter as ResAdapter
from restuning.tuners.combine import DropPath as DropPath
from restuning.tuners.combine import Sum as Sum
from restuning.tuners.context import at_time as at_time
from restuning.tuners.context import read_real_tokens as read_real_tokens
from restuning.tuners.context import read_timestep as read_timestep
from restuning.tuners.context import real_tokens as real_tokens
from restuning.tuners.conv import ConvAdapter as ConvAdapter
from restuning.tuners.film import FilmAdapter as FilmAdapter
from restuning.tuners.grid import BINS as BINS
from restuning.tuners.grid import average_profiles as average_profiles
from restuning.tuners.lora import ConvLora as ConvLora
from restuning.tuners.lora import Lora as Lora
from restuning.tuners.precision import in_own_precision as in_own_precision
from restuning.tuners.prefix import ResPrefix as ResPrefix
from restuning.tuners.prompt import ResPrompt as ResPrompt
from restuning.tuners.prompt import StemPrompt as StemPrompt
from restuning.tuners.scale import Scaled as Scaled
from restuning.tuners.token_mixing import ContextAdapter as ContextAdapter
from restuning.tuners.token_mixing import LowRankAttention as LowRankAttention
from restuning.tuners.view import FrozenAttention as FrozenAttention
from restuning.tuners.wrapper import Wrapper as Wrapper
