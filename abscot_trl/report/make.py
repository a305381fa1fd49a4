"""results.json, report.md, report.html and the table in the terminal."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import read_results
from abscot_trl.markdown import escaped, markdown_table
from abscot_trl.report import plots, rl, sections
from abscot_trl.report.page import browser, page
from abscot_trl.report.runs import over_training, read_answers, reinforced, warmups
from abscot_trl.report.tables import results_table
from abscot_trl.report.verdict import measured, verdict_line, verdicts
from abscot_trl.storage import check_folder, write_whole

MARKER = ".report"  # in the output: digest and name of each file that a report wrote there


def _plain(command: str) -> str:
    """A command as it may stand between backticks."""
    return "".join(character if character.isprintable() else " " for character in command).replace("`", "'")


def write_own(output: Path, files: dict[str, bytes]) -> None:
    """
    Write `files` into `output`, each whole, in the place of those that an earlier report wrote there.

    Raises:
        Refused: one is there that no report wrote, or that was changed since; nothing is written then.
    """
    marker = output / MARKER

    def line(name: str, content: bytes) -> str:
        return f"{hashlib.sha256(content).hexdigest()}  {name}"

    output.mkdir(parents=True, exist_ok=True)
    own = marker.read_text(errors="replace").splitlines() if marker.is_file() else []
    for path in (output / name for name in files):
        if os.path.lexists(path) and not (path.is_file() and line(path.name, path.read_bytes()) in own):
            raise Refused(f"{path} is not as a report wrote it; move it away, or choose another output_dir")
    new = [line(*file) for file in files.items()]
    write_whole(marker, "\n".join([*own, *new]) + "\n")  # a kill may leave files of both
    for name, content in files.items():
        write_whole(output / name, content)
    write_whole(marker, "\n".join(new) + "\n")


def _png(figure) -> bytes:
    plots.save(figure, buffer := BytesIO())
    return buffer.getvalue()


def _markdown(title: str, command: str, head: str, judged: list[dict], parts: list[dict]) -> str:
    lines = [
        f"# {escaped(title)}",
        "",
        f"Made by `{_plain(command)}`; the answers one by one: [report.html](report.html).",
        "",
        *([f"Measured with {escaped(head)}; what differs is said where it does.", ""] if head else []),
    ]
    lines += map(verdict_line, judged)
    for section in parts:
        lines += ["", f"## {section['title']}", "", *([escaped(section["words"]), ""] if section["words"] else [])]
        for table in section["tables"]:
            lines += [*([f"{escaped(table['title'])}:", ""] if table["title"] else [])]
            lines += [markdown_table(table["header"], table["rows"]), ""]
        for name, (_, caption) in section["figures"].items():
            lines += [f"![{name.replace('_', ' ')}]({name}.png)", "", escaped(caption), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).rstrip() + "\n")


def _results(run: Path) -> list[dict]:
    """
    Raises:
        Refused: as `read_results`; of a warm-up or baselines, which evaluate themselves, in other words.
    """
    if not run.exists():
        raise Refused(f"{run} is not there; what `abscot warmup` calls run_dir, or evaluate output_dir, is shown here")
    if (run / "splits.json").is_file() and not (run / "results.json").exists():
        raise Refused(
            f"{run} holds no results yet: it has not ended, and the same `abscot warmup` (or baselines) command goes "
            "on; or its recipe names no `evaluate`, and `abscot evaluate` scores its last model"
        )
    return read_results(run)


@dataclass
class ReportArguments:
    """
    Table, figures and answers of one or more runs: `report.md` with its figures, and `report.html`, one file.

    Args:
        runs (`list[str]`): folders that hold a `results.json`, or such files; or what `abscot grpo` trained.
        output_dir (`str`, *optional*): where it all goes; `report` in the first run's folder.
        chance (`float`, *optional*): accuracy of guessing in points, drawn as a line; near it no verdict is passed.
            Left out, the verdict takes how often an answer after another problem's trace is a third problem's.
    """

    runs: list[str] = field(metadata={"help": "Folders with a results.json, or such files, or of abscot grpo."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where it all goes; default: report in the first run's folder."}
    )
    title: str = field(default="Results", metadata={"help": "Heading of the report."})
    chance: float | None = field(default=None, metadata={"help": "Accuracy of guessing, drawn as a line."})

    def __post_init__(self):
        if self.chance is not None and not 0 <= self.chance <= 100:
            raise Refused(f"chance must lie in 0..100 points, got {self.chance}")


def report(args: ReportArguments, command: str | None = None) -> Path:
    """`abscot report`: join the runs, print table and verdicts, write `report.md`, its figures and `report.html`."""
    paths = [Path(run) for run in args.runs]
    folders = [path if path.is_dir() else path.parent for path in paths]
    output = Path(args.output_dir) if args.output_dir is not None else folders[0] / "report"
    check_folder(output)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise Refused(f"runs: {' '.join(args.runs)}: one stands twice; name each once")
    names = [folder.resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else list(args.runs)
    several = len(paths) > 1
    runs = dict(zip(names, folders, strict=True))
    learnt = {name: reinforced(folder) for name, folder in runs.items()}
    results = [
        {**row, **({"run": name} if several else {})}
        for path, name in zip(paths, names, strict=True)
        if not learnt[name] or (path if path.is_file() else path / "results.json").exists()
        for row in _results(path)
    ]
    groups = [
        (folder, group.label + (f" ({name})" if several and name != group.model else ""), group)
        for name, folder in runs.items()
        for group in read_answers(folder)
    ]
    trained = {
        name if folder == run else f"{folder.name} ({name})" if several else folder.name: folder
        for name, run in runs.items()
        for folder in warmups(run)
    }
    summaries = {name: stages for name, folder in trained.items() if (stages := over_training(folder))}
    main = [row for row in results if not row.get("stage")] or results
    sweeps = [
        {**row, "sweep": name}
        for name, folder in trained.items()
        if (folder / "sweep" / "results.json").is_file()
        for row in read_results(folder / "sweep")
    ]
    learnt = {
        f"{phase} ({name})" if phase and several else phase or name: one
        for name, phases in learnt.items()
        for phase, one in phases.items()
    }
    judged, head = verdicts(main, args.chance), measured(main) if main else ""
    parts = [
        sections.results_section(main, args.chance) if main else None,
        sections.swaps_section(main),
        sections.stages_section(results + sweeps, main),
        sections.codebook_section([entry for entry in groups if entry[2].mode == "abstract"], summaries, judged),
        rl.section(learnt),
        sections.gauges_section(trained),
        sections.training_section(trained),
        sections.published_section(main),
        sections.settings_section(runs),
    ]
    parts = [part for part in parts if part]
    command = command or f"abscot report --runs {' '.join(args.runs)}"
    figures = {f"{name}.png": _png(figure) for part in parts for name, (figure, _) in part["figures"].items()}
    text = _markdown(args.title, command, head, judged, parts)
    html = page(args.title, command, head, judged, parts, browser(groups))
    write_own(output, figures | {"report.md": text.encode(), "report.html": html.encode()})
    said = [f"{v['model']}: {v['words']}." for v in judged] + [rl.says(name, *one) for name, one in learnt.items()]
    print("\n".join([results_table(results)] * bool(results) + said))  # noqa: T201
    return output / "report.md"
