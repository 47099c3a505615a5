"""Res-Tuning: small tuners that run beside a frozen backbone, and a bypass that detaches them.

Names are imported when they are first used: `import restuning` alone does not import torch, so that
`restuning --help` answers at once.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from restuning._version import __version__ as __version__

if TYPE_CHECKING:
    from restuning import methods as methods
    from restuning._errors import EngineError as EngineError
    from restuning._errors import NoSitesError as NoSitesError
    from restuning._errors import RestuningError as RestuningError
    from restuning._errors import SiteNotReachedError as SiteNotReachedError
    from restuning._errors import WrongBackboneError as WrongBackboneError
    from restuning.backbones import export_engine as export_engine
    from restuning.backbones import load_backbone as load_backbone
    from restuning.bypass import Bypass as Bypass
    from restuning.bypass import SideNetwork as SideNetwork
    from restuning.bypass import UNetBypass as UNetBypass
    from restuning.bypass import side_network as side_network
    from restuning.data import load_data as load_data
    from restuning.features.embeddings import embed as embed
    from restuning.features.embeddings import retrieve as retrieve
    from restuning.host import Engine as Engine
    from restuning.host import Extractor as Extractor
    from restuning.host import Host as Host
    from restuning.host import find_sites as find_sites
    from restuning.search.train import train as train
    from restuning.search.update import update as update
    from restuning.serve import Client as Client
    from restuning.serve import Predictor as Predictor
    from restuning.serve import export_tasks as export_tasks
    from restuning.sites import Branch as Branch
    from restuning.sites import Features as Features
    from restuning.sites import Layer as Layer
    from restuning.sites import Needs as Needs
    from restuning.sites import Projections as Projections
    from restuning.sites import Readout as Readout
    from restuning.sites import Site as Site
    from restuning.sites import Sites as Sites
    from restuning.task import Bank as Bank
    from restuning.task import Blend as Blend
    from restuning.task import Guided as Guided
    from restuning.task import MultiTask as MultiTask
    from restuning.task import PerRow as PerRow
    from restuning.task import Task as Task
    from restuning.task import Tuned as Tuned
    from restuning.task import describe as describe
    from restuning.task import export_peft as export_peft
    from restuning.task import import_peft as import_peft
    from restuning.task import load as load
    from restuning.task import merge as merge
    from restuning.task import push_to_hub as push_to_hub
    from restuning.task import save as save
    from restuning.training import BestCheckpoint as BestCheckpoint
    from restuning.training import Callback as Callback
    from restuning.training import EarlyStopping as EarlyStopping
    from restuning.training import FitSettings as FitSettings
    from restuning.training import evaluate as evaluate
    from restuning.training import evaluate_task as evaluate_task
    from restuning.training import fit as fit
    from restuning.tuners import ConvAdapter as ConvAdapter
    from restuning.tuners import ConvLora as ConvLora
    from restuning.tuners import DropPath as DropPath
    from restuning.tuners import FilmAdapter as FilmAdapter
    from restuning.tuners import FrozenAttention as FrozenAttention
    from restuning.tuners import Lora as Lora
    from restuning.tuners import ResAdapter as ResAdapter
    from restuning.tuners import ResPrefix as ResPrefix
    from restuning.tuners import ResPrompt as ResPrompt
    from restuning.tuners import Scaled as Scaled
    from restuning.tuners import StemPrompt as StemPrompt
    from restuning.tuners import Sum as Sum
    from restuning.tuners import Tuner as Tuner
    from restuning.tuners import tuner as tuner

# The same names as above, by the room that gives them; a test compares the two.
_ROOMS = {
    "_errors": (
        "EngineError",
        "NoSitesError",
        "RestuningError",
        "SiteNotReachedError",
        "WrongBackboneError",
    ),
    "backbones": (
        "export_engine",
        "load_backbone",
    ),
    "bypass": (
        "Bypass",
        "SideNetwork",
        "UNetBypass",
        "side_network",
    ),
    "data": ("load_data",),
    "features.embeddings": (
        "embed",
        "retrieve",
    ),
    "host": (
        "Engine",
        "Extractor",
        "Host",
        "find_sites",
    ),
    "search.train": ("train",),
    "search.update": ("update",),
    "serve": (
        "Client",
        "Predictor",
        "export_tasks",
    ),
    "sites": (
        "Branch",
        "Features",
        "Layer",
        "Needs",
        "Projections",
        "Readout",
        "Site",
        "Sites",
    ),
    "task": (
        "Bank",
        "Blend",
        "Guided",
        "MultiTask",
        "PerRow",
        "Task",
        "Tuned",
        "describe",
        "export_peft",
        "import_peft",
        "load",
        "merge",
        "push_to_hub",
        "save",
    ),
    "training": (
        "BestCheckpoint",
        "Callback",
        "EarlyStopping",
        "FitSettings",
        "evaluate",
        "evaluate_task",
        "fit",
    ),
    "tuners": (
        "ConvAdapter",
        "ConvLora",
        "DropPath",
        "FilmAdapter",
        "FrozenAttention",
        "Lora",
        "ResAdapter",
        "ResPrefix",
        "ResPrompt",
        "Scaled",
        "StemPrompt",
        "Sum",
        "Tuner",
        "tuner",
    ),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["__version__", "methods", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


# A library says nothing by itself: whoever wants its log gives the logger `restuning` a handler and a level.
logging.getLogger("restuning").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import a public name from its room, once."""
    if name == "methods":
        return import_module("restuning.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'restuning' has no attribute {name!r}")
    value = getattr(import_module(f"restuning.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What is there, imported or not."""
    return sorted({*globals(), *__all__})
