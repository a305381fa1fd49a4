"""The model card: what it says of a run's model, and that nobody else's is written over."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny import tiny_model, toy_tokenizer
from warmups import LORA, recipes

from abscot_trl.card import ORIGIN, is_ours, new_origin, read_origin, save_origin, write_card
from abscot_trl.checkpoint import InitArguments, init_checkpoint
from abscot_trl.errors import Refused
from abscot_trl.loop.sweep import SweepArguments, sweep
from abscot_trl.loop.warmup import WarmupArguments, warmup
from abscot_trl.storage import MANIFEST, path_digest
from abscot_trl.vocabulary import AbstractVocabulary


def initialised(folder: Path, readme: str | None = None) -> Path:
    base = folder / "tiny-base"
    tiny_model(vocabulary=40).save_pretrained(base)
    toy_tokenizer().save_pretrained(base)
    if readme is not None:
        (base / "README.md").write_text(readme)
    return init_checkpoint(InitArguments(str(base), str(folder / "model"), codebook_size=8, m_max=6))


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n# Base\n", "apache-2.0"),
        ("---\nlicense: [1, 2\n---\n# Base\n", None),
        ("---\nlicense: {a: 1}\n---\n", None),
        ("no metadata", None),
        (None, None),
    ],
)
def test_an_untrained_checkpoint_says_so(tmp_path, readme, license):
    folder = initialised(tmp_path, readme)
    card = ModelCard.load(folder / "README.md")
    assert "**It is not trained**: this is tiny-base" in card.text
    assert card.data.license == license and card.data.library_name == "transformers"
    assert (f"Its licence: {license}." if license else "Its licence: not known; see the base model.") in card.text
    assert read_origin(folder) == {"base_model": "tiny-base", "license": license, "trained": []}
    assert "$" not in card.text.split("## With transformers")[0]


def test_a_hub_ids_model_is_named_in_the_metadata(tmp_path, checkpoint):
    vocabulary = AbstractVocabulary.load(checkpoint)
    save_origin(tmp_path, new_origin("someone/a-model") | {"trained": ["ATrainer"]})
    assert write_card(tmp_path, vocabulary)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/a-model" and "made from someone/a-model by ATrainer" in card.text


def test_names_are_text_in_card_and_metadata(tmp_path, checkpoint):
    """A base model's name and licence are foreign: they begin no link, no heading and no key of the metadata."""
    hostile = "x\n---\n# Owned [here](http://evil.example) <script>$m_min</script>"
    save_origin(tmp_path, {"base_model": hostile, "license": "mit\nbase_model: evil/evil", "trained": [hostile]})
    write_card(tmp_path, AbstractVocabulary.load(checkpoint))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit\nbase_model: evil/evil" and card.data.get("base_model") is None
    above = card.text.split("## With transformers")[0]
    page = MarkdownIt("commonmark").render(above)
    assert page.count("<a ") == page.count("<h1>") == 1 and "<script>" not in page and "<hr" not in page
    assert "x --- # Owned [here](http://evil.example) &lt;script&gt;$m_min&lt;/script&gt; by" in page


def test_a_damaged_origin_is_said(tmp_path, checkpoint):
    for content in ("{", '{"trained": "all"}', '{"trained": [1]}', '{"trained": [], "base_model": 1.5}'):
        (tmp_path / ORIGIN).write_text(content)
        with pytest.raises(Refused, match="origin.json is damaged"):
            write_card(tmp_path, AbstractVocabulary.load(checkpoint))


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("Its licence", "My licence"),
        lambda text: text + "A last word.\n",
        lambda text: "# Mine\n",
        lambda text: text[: text.rindex("<!--")],
        lambda text: "",
    ],
)
def test_an_edited_card_stays(tmp_path, checkpoint, edit):
    vocabulary, card = AbstractVocabulary.load(checkpoint), tmp_path / "README.md"
    assert write_card(tmp_path, vocabulary) and is_ours(card)
    assert write_card(tmp_path, vocabulary, "## Results\n\n")  # ours, so written anew
    text = edit(card.read_text())
    card.write_text(text)
    assert not write_card(tmp_path, vocabulary) and card.read_text() == text


def test_a_card_is_no_part_of_what_a_model_is(tmp_path, checkpoint):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "README.md").write_text("another")
    assert path_digest(copy) == path_digest(checkpoint)
    assert path_digest(copy, with_card=True) != path_digest(checkpoint, with_card=True)
    (copy / "generation_config.json").write_text("{}")
    assert path_digest(copy) != path_digest(checkpoint)


def times(run: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob(MANIFEST)}


@pytest.mark.slow
def test_a_run_tells_its_model_what_it_found(tmp_path, toy, capsys):
    """Figures of results.json, origin, settings, data; a second call makes nothing again; an edited card stays."""
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl"), LORA, swaps=["own", "random", "other", "none"])
    fields |= {"rounds": 1, "model": str(initialised(tmp_path, "---\nlicense: mit\n---\n"))}
    results, run = warmup(WarmupArguments(**fields)), Path(fields["run_dir"])
    model = run / "round1" / "distill-merged"
    card = ModelCard.load(model / "README.md")
    for row in results:
        figures = rf"\| {row['swap']} +\| +{row['accuracy']:.1f} \| +{row['ci95'][0]:.1f}-{row['ci95'][1]:.1f} "
        assert re.search(figures, card.text), row
    [own] = [row for row in results if row["swap"] == "own"]
    [found] = card.data.eval_results
    assert (found.metric_value, found.dataset_type) == (round(own["accuracy"], 2), own["task"])
    assert f"n = {own['n']}" in found.metric_name and card.data.license == "mit"
    assert "from tiny-base by BottleneckSFTTrainer, SelfDistillationTrainer" in card.text
    assert "- **informed" in card.text and "64 rows read, 64 kept" in card.text
    for words in ("round1/bottleneck-traces", "learning_rate 0.001", "hours, without evaluations", "transformers 5"):
        assert words in card.text
    assert str(tmp_path) not in (model / "README.md").read_text() + (model / ORIGIN).read_text()
    assert "It is not trained" in Path(fields["model"], "README.md").read_text()

    made = times(run)
    assert warmup(WarmupArguments(**fields)) == results and times(run) == made
    sweep(SweepArguments(str(run), fields["evaluate"], launch="inline"))
    swept = ModelCard.load(model / "README.md").text
    assert "## Sweep" in swept and "| base " in swept.split("## Sweep")[1] and swept.count("| informed") >= 4
    (model / "README.md").write_text("# Mine\n")
    capsys.readouterr()
    assert warmup(WarmupArguments(**fields)) == results
    assert times(run).items() >= made.items() and (model / "README.md").read_text() == "# Mine\n"
    assert f"{model}/README.md is not as this package wrote it" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on(tmp_path, toy):
    """Its manifests hold digests in which the card was one of the files; its cards bear no mark."""
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl"), LORA) | {"rounds": 1}
    run, results = Path(fields["run_dir"]), warmup(WarmupArguments(**fields))
    for path in run.rglob("README.md"):
        path.write_text("# A model that thinks in abstract tokens\n")
    for path in run.rglob(MANIFEST):
        manifest = json.loads(path.read_text())
        for key in manifest["inputs"].keys() - {"data", "problems"}:
            manifest["inputs"][key] = path_digest(manifest["settings"][key], with_card=True)
        path.write_text(json.dumps(manifest))
    made = times(run)
    assert warmup(WarmupArguments(**fields)) == results and times(run) == made
    (run / "round1" / "distill-merged" / "generation_config.json").write_text("{}")
    with pytest.raises(Refused, match="other files at model"):
        warmup(WarmupArguments(**fields))
