"""`task=card`: the card of an adapter, with the table of its evaluation."""

from pathlib import Path

from configs.program.console import console
from configs.program.errors import UserError
from data.card import CARD, AdapterCard, is_untouched, read_story
from data.disk import hub
from data.disk.adapter_directory import TRAIN_CONFIG
from data.disk.files import replace_file
from data.disk.plain_text import member
from inference.adapter import read_receipt, read_settings
from inference.card.scores import describe_scores, on_the_hub, read_scores
from inference.config import InferenceConfig
from inference.load import adapter_directory, find_named


def card(config: InferenceConfig) -> Path:
    """Writes the card of an adapter, by default README.md in its directory; returns where it is.

    Raises:
        UserError: there is no adapter, or a card is there that somebody else wrote or edited.
    """
    directory = adapter_directory(config)
    assert directory is not None
    path = Path(config.output) if config.output else directory / CARD
    if directory != Path(str(config.adapter)) and not config.output:
        raise UserError(f"output: {config.adapter} lies in the hub's cache; name a file for its card, as output={CARD}")
    _check_free(path, config.overwrite)
    settings, training = read_settings(directory), read_receipt(directory)
    named = config.base or member(training, "base").get("path") or settings.get("base_model_name_or_path")
    base, lines = _base_of(named, config.revision or settings.get("revision"), directory)
    story = read_story(base, directory, settings, training)
    scores, left_out = read_scores(directory, member(training, "base").get("fingerprint"))
    for line in (*lines, *story.left_out, *([left_out] if left_out else ())):
        console.print(line, soft_wrap=True)
    written = AdapterCard(
        directory=directory,
        name=_name_of(directory),
        settings=settings,
        training=training,
        story=story,
        base=named,
        licence=config.licence,
        evaluation=describe_scores(scores) if scores else None,
        results=on_the_hub(scores.scores if scores else []),
    )
    try:
        replace_file(path, [written.text().encode("utf-8", "replace")])
    except OSError as error:
        raise UserError(f"output={path}: it can't be written ({error.strerror}); name another file") from error
    console.print(f"Wrote {path}", soft_wrap=True)
    return path


def _check_free(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise UserError(f"output={path}: it is a directory; name a file, as output={path / CARD}")
    if path.exists() and not overwrite and not is_untouched(path):
        raise UserError(
            f"output={path}: it was not written by this program, or was edited since; name another file, or give "
            f"overwrite=true"
        )


def _base_of(source: str | None, revision: str | None, adapter: Path) -> tuple[Path | None, list[str]]:
    """The directory with the base's own card; None if it can't be had, with a line that says so."""
    if source is None:
        return None, []
    found = find_named(source, adapter)
    if Path(found).is_dir():
        return Path(found), []
    try:
        repository = hub.find("model", found, revision, f"base={found}")
        return repository.fetch(hub.matching(repository.files(), (CARD,))), []
    except UserError as error:
        return None, [f"{error}; the base's licence is left out, unless licence= names it"]


def _name_of(directory: Path) -> str:
    """A run's adapter is called as its run."""
    resolved = directory.resolve()
    return resolved.parent.name if (resolved / TRAIN_CONFIG).is_file() and resolved.name == "adapter" else resolved.name
