"""Prompt embeddings on disk: made once, where the text encoders are, and read by those that train without any.

    <folder>/<name of the text encoders>-<type>/source.json
                                               /<two digits>/<sha256 of the prompt>.safetensors

A file holds the conditions of one prompt, or of none (guidance's null prompt). It is there whole or not at all, so any
number of processes may add to a folder at once.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffinstruct.errors import UserError
from diffinstruct.method.diffusion import Conditions

NULL = None  # the prompt of the null conditions
SOURCE = "source.json"  # tells a person what lies in a folder
TEXT, MASK = "prompt_embeds", "prompt_attention_mask"
"""Conditions [B, L, D], and [B, L] of the rows that attention sees, where a family has such a mask."""
EARLIER = r"\w+-[0-9a-f]{12}"  # folders of earlier versions, which were named by all that lay in a machine's hub cache
WHOLE, SAMPLES = 2**26, 64
"""Of files with more bytes than WHOLE (a T5 has 10 GB) the digest reads so many blocks, spread over them."""


class Embeddings:
    """Those of one pipeline's text encoders, in a folder that all machines of a run see.

    name: of the text encoders. source: what a person is told of them.
    blank: one prompt's conditions as to their shapes and types.
    """

    def __init__(self, folder: Path | str, name: str, source: Mapping[str, str], blank: Conditions) -> None:
        kind = str(blank[TEXT].dtype).removeprefix("torch.")
        self.folder = Path(folder).absolute() / f"{name}-{kind}"
        self.source, self.blank = {**source, "type": kind}, blank

    def missing(self, prompts: Iterable[str | None]) -> list[str | None]:
        """Those of `prompts` that are not there, each once."""
        try:
            return [prompt for prompt in dict.fromkeys(prompts) if not self._file(prompt).exists()]
        except OSError as error:
            raise UserError(f"prompts.embeddings: {self.folder} cannot be read: {error}") from None

    def earlier(self) -> list[str]:
        """The names of folders beside this one that an earlier version made and nothing reads."""
        around = self.folder.parent
        return sorted(path.name for path in around.iterdir() if re.fullmatch(EARLIER, path.name)) if around.is_dir() else []

    def read(self, prompt: str | None) -> Conditions:
        """The conditions of one prompt, batch size 1, on the CPU. Raises UserError for one that is not there, damaged or
        of other encoders."""
        file = self._file(prompt)
        try:
            return self._padded(load_file(file))
        except (OSError, SafetensorError, ValueError) as error:
            said = f"{'the null prompt' if prompt is NULL else repr(prompt)}: {' '.join(str(error).split())}"
            mend = "delete it, and the next start makes it again"
            if not file.exists():
                mend = "the start makes what is missing; have one commit of reference.model on all machines (owner/name@commit)"
            raise UserError(f"prompts.embeddings: {file} cannot be read, for {said}; {mend}") from None

    def add(self, made: Iterable[tuple[str | None, Conditions]]) -> None:
        """Add prompts with their conditions, batch size 1. Raises UserError where the folder cannot be written."""
        self._write(
            self.folder / SOURCE, lambda path: path.write_text(json.dumps(self.source, indent=2) + "\n", encoding="utf-8")
        )
        for prompt, conditions in made:
            self._write(self._file(prompt), partial(save_file, _without_padding(conditions)))

    def _file(self, prompt: str | None) -> Path:
        name = "null" if prompt is NULL else hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _padded(self, stored: Conditions) -> Conditions:
        """With zeros where there was padding; raises ValueError for conditions of other shapes or types than `blank`'s."""
        if TEXT in stored and MASK in stored:
            stored[TEXT] = F.pad(stored[TEXT], (0, 0, 0, max(0, self.blank[TEXT].shape[1] - stored[TEXT].shape[1])))
        found, wanted = ({key: (*c[key].shape, str(c[key].dtype)) for key in sorted(c)} for c in (stored, self.blank))
        if found != wanted:
            raise ValueError(f"it holds {found}, not {wanted}")
        return stored

    @staticmethod
    def _write(file: Path, save: Callable[[Path], object]) -> None:
        temporary = file.with_suffix(f".{uuid4().hex}.tmp")  # processes of two machines may have one number
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save(temporary)
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise UserError(f"prompts.embeddings: {file} cannot be written: {error}") from None


def _without_padding(conditions: Conditions) -> Conditions:
    """Without the rows that attention does not see, where there is a mask: it gives them a weight of exactly 0, whatever
    they hold."""
    kept = {key: value.contiguous() for key, value in conditions.items()}
    if MASK in kept:
        kept[TEXT] = kept[TEXT][:, : int(kept[MASK].nonzero()[:, 1].max()) + 1].contiguous()
    return kept


def digest(files: Iterable[Path]) -> str:
    """12 hex digits for the names and the content of files. Of large ones samples do: two trainings differ everywhere."""
    sha256 = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        sha256.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            if size <= WHOLE:
                sha256.update(file.read())
                continue
            for i in range(SAMPLES):
                file.seek(i * (size - 2**16) // (SAMPLES - 1))
                sha256.update(file.read(2**16))
    return sha256.hexdigest()[:12]
