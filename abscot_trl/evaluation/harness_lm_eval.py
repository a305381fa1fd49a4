"""
lm_eval's model `abscot`: an answer after a trace (how to run it: README.md beside this file).

lm_eval releases after 0.4.13 find it by the entry point in pyproject.toml. 0.4.13 looks for none; this module is then
run in place of `lm_eval`, with the same command line:

    python -m abscot_trl.evaluation.harness_lm_eval --model abscot --model_args pretrained=FOLDER,swap=own --tasks ..
"""

import json
import logging
from collections import Counter
from dataclasses import asdict

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from abscot_trl.errors import Refused
from abscot_trl.evaluation.arguments import HarnessArguments
from abscot_trl.evaluation.harness import NO_LIKELIHOOD, Ask, TracedModel

logger = logging.getLogger("lm_eval.abscot")  # lm_eval shows its own loggers only
NEUTRAL = ("num_beams", 1), ("num_return_sequences", 1), ("repetition_penalty", 1.0)  # values may be lists


class Messages(str):
    """A chat as JSON: lm_eval hands a prompt on as text, and the model makes its tokens of the messages."""


@register_model("abscot")
class AbscotLM(LM):
    """
    Args:
        batch_size, max_batch_size, device: lm_eval always gives them; not used. `hf` batches by `batch_tokens` and
            takes the GPUs of CUDA_VISIBLE_DEVICES, vLLM does both by itself.
        arguments: the fields of [`HarnessArguments`].
    """

    def __init__(self, batch_size=None, max_batch_size=None, device=None, **arguments):
        super().__init__()
        self.model = TracedModel(HarnessArguments.of(arguments))
        self.tokenizer = self.model.tokenizer

    @property
    def tokenizer_name(self) -> str:
        return self.model.args.pretrained

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Messages:
        """Only keeps the messages; [`~abscot_trl.examples.prompt_ids`] makes the tokens, as for `abscot evaluate`."""
        if not add_generation_prompt:
            raise Refused("the task's gen_prefix would stand before the trace, in the answer; take a task without one")
        return Messages(json.dumps(chat_history, ensure_ascii=False))

    def chat_template(self, chat_template: bool | str = False) -> str:
        if isinstance(chat_template, str):
            raise Refused(f"the checkpoint has one chat template; leave {chat_template!r} out")
        return self.tokenizer.chat_template

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers alone. The n-th request for one document is its n-th sample."""
        asks, seen = [], Counter()
        for request in requests:
            context, settings = request.args
            key = (request.task_name, request.doc_id)
            messages = json.loads(context) if isinstance(context, Messages) else [{"role": "user", "content": context}]
            asks.append(Ask(*key, seen[key], messages, **self._decoding(settings)))
            seen[key] += 1
        answers = self.model.answer(asks)
        for line in self.model.words():
            logger.info(line)
        return [answer["text"] for answer in answers]

    def _decoding(self, settings: dict) -> dict:
        settings = normalize_gen_kwargs(settings, self.model.args.max_gen_toks)
        if settings.pop("do_sample"):
            settings.setdefault("temperature", 1.0)  # as transformers
        settings["max_new_tokens"] = settings.pop("max_gen_toks")
        known = ("until", "max_new_tokens", "temperature", "top_p", "top_k")
        unknown = [name for name in settings if name not in known and (name, settings[name]) not in NEUTRAL]
        if unknown:
            raise Refused(
                f"gen_kwargs: {', '.join(unknown)} cannot be honoured; until, max_gen_toks, do_sample, temperature, "
                "top_p and top_k can"
            )
        return {name: settings[name] for name in known if name in settings}

    def get_model_info(self) -> dict:
        """What lm_eval adds to `config` in its results, after the answers were made."""
        return {"abscot": asdict(self.model.args) | {"tasks": self.model.summary()}}

    def set_cache_hook(self, cache_hook) -> None:
        raise Refused("use_cache: lm_eval's cache does not know which swap an answer came after; leave it out")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise Refused(NO_LIKELIHOOD)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise Refused(NO_LIKELIHOOD)


def main() -> None:
    """`lm_eval`'s command line, with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
