"""Prompt embeddings on disk: made once, where the text encoders are, and read by those that train without any.

    <folder>/<digest of text encoders and tokenizers>/<two digits>/<sha256 of the prompt>.safetensors

A file holds the conditions of one prompt, or of none (guidance's null prompt). It is there whole or not at all, so any
number of processes may add to a folder at once.
"""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffinstruct.errors import UserError
from diffinstruct.method.diffusion import Conditions

NULL = None  # the prompt of the null conditions
WHOLE, SAMPLES = 2**26, 64
"""Of files with more bytes than WHOLE (a T5 has 10 GB) the digest reads so many blocks, spread over them."""


class Embeddings:
    """Those of one encoder in a folder that all machines of a run see."""

    def __init__(self, folder: Path | str, encoder: str) -> None:
        self.folder = Path(folder).absolute() / encoder

    def missing(self, prompts: Iterable[str | None]) -> list[str | None]:
        """Those of `prompts` that are not there, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self._file(prompt).exists()]

    def read(self, prompt: str | None) -> Conditions:
        """The conditions of one prompt, batch size 1, on the CPU. Raises UserError for one not there or damaged."""
        file = self._file(prompt)
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            said = f"{'the null prompt' if prompt is None else repr(prompt)}: {' '.join(str(error).split())}"
            raise UserError(f"prompts.embeddings: {file} cannot be read, for {said}; a run makes what is missing") from None

    def add(self, prompt: str | None, conditions: Conditions) -> None:
        file = self._file(prompt)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous().cpu() for key, value in conditions.items()}, temporary)
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise UserError(f"prompts.embeddings: {file} cannot be written: {error}") from None

    def _file(self, prompt: str | None) -> Path:
        name = "null" if prompt is None else hashlib.sha256(prompt.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


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
