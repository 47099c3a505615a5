"""Answers of saved tasks to images and texts."""

from restuning.serve.inputs import file_texts as file_texts
from restuning.serve.predictor import Answer as Answer
from restuning.serve.predictor import Prediction as Prediction
from restuning.serve.predictor import Predictor as Predictor
