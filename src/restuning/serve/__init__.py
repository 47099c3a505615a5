"""Answers of saved tasks to images and texts: in this process, and to many who ask a server."""

from restuning.serve.batcher import Batcher as Batcher
from restuning.serve.batcher import Live as Live
from restuning.serve.batcher import Pace as Pace
from restuning.serve.batcher import Reply as Reply
from restuning.serve.client import Client as Client
from restuning.serve.export import ExportedTasks as ExportedTasks
from restuning.serve.export import export_tasks as export_tasks
from restuning.serve.inputs import file_texts as file_texts
from restuning.serve.limits import Limits as Limits
from restuning.serve.predictor import Answer as Answer
from restuning.serve.predictor import Prediction as Prediction
from restuning.serve.predictor import Predictor as Predictor
from restuning.serve.predictor import open_task as open_task
from restuning.serve.service import Service as Service
from restuning.serve.web.application import app as app
