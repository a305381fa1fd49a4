"""
A model file for `lighteval custom`: an answer after a trace (how to run it: README.md beside this file).

    lighteval custom pretrained=FOLDER,swap=own abscot_trl/evaluation/harness_lighteval.py TASK

`lighteval custom` knows no model arguments, so they stand in the model's name, which also names the results' folder.
"""

import logging
import re
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import yaml
from lighteval.models.abstract_model import LightevalModel
from lighteval.models.custom.custom_model import CustomModelConfig
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.prompt_manager import PromptManager
from lighteval.tasks.requests import Doc

from abscot_trl.errors import Refused
from abscot_trl.evaluation.arguments import HarnessArguments
from abscot_trl.evaluation.harness import NO_LIKELIHOOD, Ask, TracedModel

logger = logging.getLogger("lighteval.abscot")


@dataclass(kw_only=True)
class LightevalArguments(HarnessArguments):
    """lighteval's tasks name no temperature: `temperature`, `top_p` and `top_k` are those of the answers."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


class Config(CustomModelConfig):
    """lighteval writes its model's configuration into the results; `abscot` is what we add to it."""

    abscot: dict = {}


def read_name(name: str) -> dict:
    """`a=1,b={"c": 2}` as a mapping; values are read as YAML."""
    pairs = [pair.partition("=") for pair in re.split(r",(?![^{]*\})", name)]
    return {key: yaml.safe_load(value) for key, _, value in pairs}


class AbscotModel(LightevalModel):
    def __init__(self, config: CustomModelConfig):
        self.config = Config(**config.model_dump())
        self.model = TracedModel(LightevalArguments.of(read_name(config.model_name)))
        self._cache = SimpleNamespace(_init_registry=lambda registry: None)  # lighteval asks for one

    @property
    def tokenizer(self):
        return self.model.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        return False

    @property
    def max_length(self) -> int:
        return self.model.sampler.positions

    def greedy_until(self, docs: list[Doc]) -> list[ModelResponse]:
        """The answers alone. lighteval shuffles the documents; `id` is a document's row."""
        args, prompts, asks = self.model.args, PromptManager(use_chat_template=True), []
        for doc in docs:
            if doc.images:
                raise Refused(f"{doc.task_name}: a document with images; abscot's models read text")
            messages, length = prompts.prepare_prompt_api(doc), doc.generation_size or args.max_gen_toks
            drawn = (args.temperature, args.top_p, args.top_k, doc.stop_sequences or [])
            samples = range(doc.num_samples)
            asks += [Ask(doc.task_name, int(doc.id), sample, messages, length, *drawn) for sample in samples]
        answers = iter(self.model.answer(asks))
        self.config.abscot = asdict(args) | {"tasks": self.model.summary()}
        responses = []
        for doc in docs:
            some = [next(answers) for _ in range(doc.num_samples)]
            traces = ["".join(self.model.vocabulary.tokens[i] for i in answer["trace"]) for answer in some]
            responses.append(ModelResponse(text=[answer["text"] for answer in some], reasonings=traces))
        return responses

    def cleanup(self) -> None:
        for line in self.model.words():
            logger.info(line)

    def loglikelihood(self, docs: list[Doc]) -> list[ModelResponse]:
        raise Refused(NO_LIKELIHOOD)

    def loglikelihood_rolling(self, docs: list[Doc]) -> list[ModelResponse]:
        raise Refused(NO_LIKELIHOOD)
