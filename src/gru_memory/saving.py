"""Memories on disk and on the hub: `memory_config.json`, `memory_model.safetensors` and a model card.

The memory alone, never a base weight, and never a pickle. `save_pretrained` writes the whole model instead.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .base_identity import REPO_ID, check_base, describe_base
from .config import CONFIG_NAME, MemoryConfig
from .model_card import CARD_NAME, is_ours, memory_card
from .own_sites import OWN_SITES_KEY, build_own_sites, check_given, describe_own_sites
from .sharding import has_shards, one_writes, whole

WEIGHTS_NAME = "memory_model.safetensors"
BASE_KEY = "base_model"
MAX_CONFIG_BYTES = 1 << 20
_LOADED_AS = "loaded_as"  # in the file's header: the type of its numbers in a model, where the file has a shorter one
_KNOWN_AS = (
    "digest",
    "fingerprint",
)  # in the header, where a cast came before the file: of its weights, and of the memory
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16)}
_HEADER_BYTES = 1 << 20  # room for what a safetensors file holds besides its tensors
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class SavedMemory:
    """A memory on disk, its config read and its weights not yet.

    Attributes:
        where: the folder or the name on the hub, for messages.
        config: the memory's.
        base: what `describe_base` said of the model under it.
        own_sites: what `describe_own_sites` said of the sites that are modules of the user's own.
        weights: the safetensors file.
    """

    where: str
    config: MemoryConfig
    base: dict[str, Any]
    own_sites: dict[str, Any]
    weights: Path

    def read_weights(self, wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
        """The tensors of these names and shapes. Nothing is read before the file holds exactly those.

        Raises:
            ValueError: a file that is damaged, of another kind, larger than those tensors could make it, or that holds
                other tensors or numbers that are not finite.
        """
        size, limit = self.weights.stat().st_size, _HEADER_BYTES + 8 * sum(shape.numel() for shape in wanted.values())
        if size > limit:
            raise ValueError(
                f"{self.weights} has {size:,} bytes, and a memory of this {CONFIG_NAME} at most {limit:,}: nothing was read. "
                "Copy or save the memory again"
            )
        try:
            with safe_open(self.weights, "pt") as file:
                found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                names = sorted(name for name in {**found, **wanted} if not _fits(found.get(name), wanted.get(name)))
                if names:
                    raise ValueError(
                        f"the weights in {self.where} do not fit its {CONFIG_NAME} ({', '.join(names[:3])}"
                        f"{', ...' if len(names) > 3 else ''}): copy or save the memory again"
                    )
                # Clones, since what safetensors returns may still lie in the file.
                loaded_as = _DTYPES.get((file.metadata() or {}).get(_LOADED_AS))
                weights = {name: file.get_tensor(name).clone().reshape(shape) for name, shape in wanted.items()}
        except SafetensorError as error:
            raise ValueError(_not_safetensors(self.weights, error)) from error
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise ValueError(f"{name} in {self.weights} holds NaN or infinite numbers: restore it from a copy")
        if loaded_as is not None:
            weights |= {name: tensor.to(loaded_as) for name, tensor in weights.items() if tensor.is_floating_point()}
        return weights

    def known_as(self) -> dict[str, str]:
        """The fingerprint of a memory that was cast before it was saved, under the digest of the weights it has now."""
        with safe_open(self.weights, "pt") as file:
            digest, fingerprint = ((file.metadata() or {}).get(key) for key in _KNOWN_AS)
        return {digest: fingerprint} if digest and fingerprint else {}


def read_memory(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> SavedMemory:
    """Find a saved memory and read its config.

    Args:
        source: a folder, or a repository on the hub, "user/repo" (where no folder has that name).
        revision, token, cache_dir, local_files_only: of the hub, as for `huggingface_hub.hf_hub_download`.
        subfolder: where in the folder or repository the memory is.

    Raises:
        ValueError: no memory there, or a config that is damaged or from a newer version.
        OSError: the repository or revision does not exist, or cannot be reached.
    """
    folder = Path(source).expanduser()
    if isinstance(source, str) and not folder.exists() and REPO_ID.fullmatch(source):
        where = "/".join([source, *([subfolder] if subfolder else [])]) + (f" at {revision}" if revision else "")
        options = {"revision": revision, "token": token, "subfolder": subfolder}
        options |= {"cache_dir": cache_dir, "local_files_only": local_files_only}
        config_path = _download(source, CONFIG_NAME, where, options)
        config, base, own_sites = _read_config(config_path)  # refused before the weights are fetched
        return SavedMemory(where, config, base, own_sites, _download(source, WEIGHTS_NAME, where, options))
    folder = folder / (subfolder or "")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            continue
        pickles = [path.name for suffix in _PICKLES for path in sorted(folder.glob(f"*{suffix}"))]
        if pickles:
            raise ValueError(
                f"{folder} holds {pickles[0]} and no {name}: pickle files can run code and are never read. Ask for the memory as "
                "save_memory writes it"
            )
        raise ValueError(
            f"{folder} holds no memory: {name} is missing. Write one with model.save_memory({str(folder)!r})"
        )
    return SavedMemory(str(folder), *_read_config(folder / CONFIG_NAME), folder / WEIGHTS_NAME)


class MemorySavingMixin:
    """Saving, loading and sharing of the memory alone."""

    def save_memory(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        recall: str | Path | dict[str, Any] | None = None,
        card: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write a memory (not the model under it, and not its state) and its model card into `folder`.

        A README.md there that somebody else wrote stays as it is. Of a model that FSDP2 has sharded every process holds a
        part: all of them must call this, and the first one writes.

        Args:
            folder: made if it does not exist; "~" is the user's own, as for `load_memory`.
            name: which memory of the model; the active one if None.
            recall: what `gru-memory eval recall` wrote (recall.json), for the figures on the card.
            card: fields of `huggingface_hub.ModelCardData` to set, such as license, language or base_model.
            dtype: of the floats in the file, such as torch.float16 for one half as large; None keeps them as they are.
                Either way they are loaded in the type that they have now.

        Raises:
            ValueError: no memory of that name, a `recall` of another kind, or a `dtype` that is none of floats. Nothing is written
                then.
        """
        self._write_memory(Path(folder).expanduser(), name, recall, card, None, dtype)

    def load_memory(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        sites: dict[str, nn.Module] | None = None,
        check_base: bool = True,
    ) -> None:
        """Put a saved memory on this model; its state starts empty.

        Args:
            source: a folder, or a repository on the hub ("user/repo"). Where both exist, the folder.
            name: to load it under. A memory of that name is replaced; a further one waits for `set_memory`. None
                replaces the active one.
            revision, token, subfolder, cache_dir, local_files_only: as for `read_memory`.
            sites: a module for every site that was one of your own when the memory was saved, unless `register_site` knows it.
            check_base: also refuse other weights under the memory, not only another family or other sizes.

        Raises:
            ValueError: no memory there, a damaged one, one of a newer version, or one for another base model.
            OSError: the repository or revision does not exist, or cannot be reached.
            The model keeps what it has.
        """
        saved = read_memory(
            source,
            revision=revision,
            token=token,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        self._load_saved(saved, name, sites, check_base)

    def push_memory_to_hub(
        self,
        repo_id: str,
        name: str | None = None,
        *,
        recall: str | Path | dict[str, Any] | None = None,
        card: dict[str, Any] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        commit_message: str = "Upload memory",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_memory` writes; `push_to_hub` uploads the whole model instead.

        Args:
            repo_id: "user/repo", made if it does not exist. A README.md there that somebody else wrote stays as it is.
            name, recall, card: as for `save_memory`.
            private: whether a repository that is made is private.
            token: of the hub; None takes the one that is stored on this machine.
            revision: branch to write to, made if it does not exist.
            subfolder: where in the repository.
            commit_message, create_pr: as for `huggingface_hub.HfApi.upload_folder`.

        Returns:
            The commit's URL.

        Raises:
            ValueError: as for `save_memory`. Nothing has been sent then.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        """
        from . import __version__

        if has_shards(self):
            raise RuntimeError(
                "this model is sharded over several processes: save_memory(folder) on all of them, then load and push it in one"
            )
        with tempfile.TemporaryDirectory() as folder:
            place = {"revision": revision, "subfolder": subfolder}
            place = {what: where for what, where in place.items() if where and where != "main"}
            self._write_memory(Path(folder), name, recall, card, repo_id, place=place)
            api = HfApi(token=token, library_name="gru-memory", library_version=__version__)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            card_path = f"{subfolder}/{CARD_NAME}" if subfolder else CARD_NAME
            keep = False
            if api.file_exists(repo_id, card_path, revision=revision):
                theirs = api.hf_hub_download(repo_id, card_path, revision=revision, local_dir=f"{folder}/hub")
                keep = not is_ours(Path(theirs).read_text(encoding="utf-8"))
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, *([] if keep else [CARD_NAME])],
            ).commit_url

    def _write_memory(
        self,
        folder: Path,
        name: str | None,
        recall: Any,
        card: Any,
        repo_id: str | None,
        dtype: torch.dtype | None = None,
        place: dict[str, str] | None = None,
    ) -> None:
        name = self._require(name)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {dtype!r}: give one of floats, such as torch.float16")
        sites, config = self._sites_of(name), self.memories[name]
        weights = {
            f"{site}.{key}": whole(tensor.detach()).cpu().contiguous()
            for site, module in sites.items()
            for key, tensor in module.state_dict().items()
        }
        if changed := [key for key in weights if ".base_layer." in key or ".lora_" in key]:
            raise ValueError(
                f"peft has put adapters into the memory itself ({changed[0]}, ...), and a memory is saved without any: keep them "
                'out with exclude_modules=r".*gru_memory.*" in the LoraConfig'
            )
        header = {"format": "pt"}
        floats = {key: tensor for key, tensor in weights.items() if tensor.is_floating_point()}
        if dtype is not None and floats:
            header[_LOADED_AS] = str(next(iter(floats.values())).dtype).removeprefix("torch.")
            weights |= {key: tensor.to(dtype) for key, tensor in floats.items()}
        header |= dict(zip(_KNOWN_AS, self._lineage_of(name), strict=False))
        base = describe_base(self)
        values = {**config.to_dict(), BASE_KEY: base}
        if own := describe_own_sites(sites):
            values[OWN_SITES_KEY] = own
        text = memory_card(config, base, sum(t.numel() for t in weights.values()), recall, card, repo_id, place)
        with one_writes(self) as writes:
            if writes:
                self._write_files(folder, weights, header, values, text)

    def _write_files(
        self, folder: Path, weights: dict[str, Tensor], header: dict[str, str], values: dict[str, Any], text: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as part:  # whole files or none
            save_file(weights, Path(part, WEIGHTS_NAME), header)
            Path(part, CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            names = [WEIGHTS_NAME, CONFIG_NAME]
            present = folder / CARD_NAME
            if not present.exists() or is_ours(present.read_text(encoding="utf-8", errors="replace")):
                Path(part, CARD_NAME).write_text(text, encoding="utf-8")
                names.append(CARD_NAME)
            for written in names:
                Path(part, written).replace(folder / written)

    def _load_saved(
        self, saved: SavedMemory, name: str | None, given: dict[str, nn.Module] | None, weights_too: bool
    ) -> None:
        given = check_given(given, saved.config.sites)
        check_base(saved.base, self, saved.where, weights_too)
        # On no device: whatever sizes the config asks for, nothing is allocated before the file is seen to have them.
        own = build_own_sites(saved.own_sites, given, saved.where, "meta")
        try:
            sites = {
                site: own[site] if site in own else self.build_site(saved.config, site, "meta")
                for site in saved.config.sites
            }
        except (RuntimeError, OverflowError, TypeError) as error:
            raise ValueError(f"no memory can have the sizes in {saved.where} ({error}): save it again") from error
        wanted = {f"{site}.{k}": v.shape for site, module in sites.items() for k, v in module.state_dict().items()}
        weights = saved.read_weights(wanted)
        sites |= build_own_sites(
            saved.own_sites, given, saved.where
        )  # with numbers that no file holds, such as buffers
        for site, module in sites.items():
            loaded = {k.removeprefix(f"{site}."): v for k, v in weights.items() if k.startswith(f"{site}.")}
            module.load_state_dict(loaded, assign=site not in own)
        self._cast_from().update(saved.known_as())
        self.attach_memory(saved.config, sites, name)


def _read_config(path: Path) -> tuple[MemoryConfig, dict[str, Any], dict[str, Any]]:
    """Config, base model and own sites. Format 1 knew neither the base model's name and weights nor own sites."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: no memory config is that large, nothing was read")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        base, own = values.pop(BASE_KEY), values.pop(OWN_SITES_KEY, {})
        for name, found in ((BASE_KEY, base), (OWN_SITES_KEY, own)):
            if not isinstance(found, dict):
                raise TypeError(f"{name} is {found!r}")
        return MemoryConfig.from_dict(values), base, own
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a memory config ({error}): save the memory again") from error


def _download(repo_id: str, filename: str, where: str, options: dict[str, Any]) -> Path:
    from . import __version__

    try:
        return Path(
            hf_hub_download(repo_id, filename, library_name="gru-memory", library_version=__version__, **options)
        )
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"there is no folder {repo_id!r} here, and {filename} of {where} is not in the cache and the hub cannot be reached: "
            "check the path, or the connection"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"{where} holds no memory: {filename} is missing. Upload one with model.push_memory_to_hub({repo_id!r})"
        ) from error
    except HfHubHTTPError as error:
        raise OSError(
            f"there is no folder {repo_id!r} here, and the hub does not give {filename} of {where} ({type(error).__name__}): "
            "check the name and the revision; a private repository also needs a token"
        ) from error


def _fits(found: torch.Size | None, wanted: torch.Size | None) -> bool:
    return found == wanted or (found == () and wanted == (1,))  # a gate was a number before format 3


def _not_safetensors(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    # A zip archive, as torch.save makes, or the first byte of a pickle and the number of its protocol
    if start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return (
            f"{path} is a pickle file under the name of a safetensors file: pickle files can run code and are never read. "
            "Ask for the memory as save_memory writes it"
        )
    return f"{path} is damaged or not a safetensors file ({error}): copy or save the memory again"
