"""Training and judging tasks of diffusion models; imports no model library."""

from restuning.diffusion.encode import EncodedPairs as EncodedPairs
from restuning.diffusion.encode import Encoder as Encoder
from restuning.diffusion.encode import encode as encode
from restuning.diffusion.evaluate import ErrorByTime as ErrorByTime
from restuning.diffusion.evaluate import density_and_coverage as density_and_coverage
from restuning.diffusion.evaluate import frechet_distance as frechet_distance
from restuning.diffusion.evaluate import held_out_error as held_out_error
from restuning.diffusion.judge import JudgingProtocol as JudgingProtocol
from restuning.diffusion.judge import judge_images as judge_images
from restuning.diffusion.objective import Objective as Objective
from restuning.diffusion.objective import linear_alphas as linear_alphas
from restuning.diffusion.pairs import Pairs as Pairs
from restuning.diffusion.pairs import load_pairs as load_pairs
from restuning.diffusion.pictures import save_grid as save_grid
from restuning.diffusion.sample import sample as sample
from restuning.diffusion.settings import DenoiserSettings as DenoiserSettings
from restuning.diffusion.train import DenoiserTraining as DenoiserTraining
from restuning.diffusion.train import train_denoiser as train_denoiser
from restuning.diffusion.tune import PipelineRequest as PipelineRequest
from restuning.diffusion.tune import Samples as Samples
from restuning.diffusion.tune import TunedPipeline as TunedPipeline
from restuning.diffusion.tune import tune_pipeline as tune_pipeline
from restuning.diffusion.tuned_denoiser import TunedDenoiser as TunedDenoiser
from restuning.diffusion.tuned_denoiser import as_denoiser as as_denoiser
