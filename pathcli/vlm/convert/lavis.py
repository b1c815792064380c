"""A checkpoint of LAVIS with a Q-Former before a language model in; a run's parts out.

CLOVER's, BLIP-2's of the second stage, and InstructBLIP's. Where words of a question go to the
Q-Former, CLOVER's prompt is written into the recipe; how it generates is CLOVER's, too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from pathcli.errors import DataError
from pathcli.vlm.convert import Made
from pathcli.vlm.convert.files import read_pickle
from pathcli.vlm.convert.parts import check_width, encoder_section, language_name, numbers
from pathcli.vlm.language_files import shape_of
from pathcli.vlm.qformer import QFormer
from pathcli.vlm.qformer_weights import read_qformer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pathcli.vlm.convert import Job

    State = dict[str, Tensor]

HEADS = 12  # of bert-base-uncased, which LAVIS' Q-Former always is
DECODING = {"beams": 5, "max_new_tokens": 40, "min_new_tokens": 5}  # CLOVER's
_PREFIX = (
    "Now that you are a pathologist, please answer the following questions based on the images. "
)
_CLOSED = "please only answer yes or no."

_TOWER, _WORDS = "visual_encoder.", re.compile(r"(llm|t5|opt)_model\.|bert\.|lm_head\.")
_QFORMER = re.compile(r"Qformer\.|query_tokens$|ln_vision\.|(llm|t5|opt)_proj\.")
_HEADS = re.compile(r"(Qformer\.cls|itm_head|vision_proj|text_proj)\.|temp$|.*position_ids$")


def read(job: Job) -> Made:
    """Return a checkpoint's parts; a vision tower in it goes to `encoder.safetensors`.

    Raises:
        UsageError: the language model has to be named, or is of another width.
        DataError: tensors are missing or have no place, or it is of the first stage.
    """
    state = read_pickle(job.source)
    sizes = _sizes(read_qformer(job.source), job)
    dim_in, dim_out = sizes.pop("dim_in"), sizes.pop("dim_out")
    language = language_name(job.language, "", job.source)
    check_width(language, dim_out, job.source)
    connector = QFormer(dim_in, dim_out, **sizes, init=str(job.source))
    if drawn := connector.start()["drawn"]:
        msg = f"{job.source}: {drawn} tensors of its projection are missing"
        raise DataError(msg)
    weights = {f"connector.{name}": x for name, x in connector.state_dict().items()}
    _account(job, state, connector.state_dict())
    penalty = -1.0 if shape_of(language).seq2seq else 0.0
    chat = {"template": "flan", "question_limit": 128, "answer_limit": 256}
    if sizes["instruct"]:
        chat |= {"prefix": _PREFIX, "closed": _CLOSED}
    sections = {
        "encoder": _encoder(job, state),
        "connector": {"kind": "qformer", **sizes, "init": "random"},
        "language": {"kind": "hf", "model": language, "tune": "frozen", "load": numbers(language)},
        "chat": chat,
    }
    return Made(sections, weights, DECODING | {"length_penalty": penalty})


def _sizes(found: State, job: Job) -> dict[str, Any]:
    """Return the arguments of a Q-Former of these weights, `dim_in` and `dim_out` among them."""
    if "project.weight" not in found:
        msg = f"{job.source}: leads to no language model (llm_proj, t5_proj, opt_proj): a first "
        raise DataError(msg + "stage, which connector.init of a recipe reads")
    cross = sorted({int(n.split(".")[1]) for n in found if ".cross." in n})
    last = max(int(name.split(".")[1]) for name in found if name.startswith("layers."))
    try:
        sizes = {
            "dim_in": found["layers.0.cross.key.weight"].shape[1],
            "dim_out": len(found["project.weight"]),
            "queries": len(found["queries"]),
            "width": found["queries"].shape[1],
            "layers": last + 1,
            "heads": HEADS,
            "hidden": len(found["layers.0.queries.up.weight"]),
            "cross_every": cross[1] - cross[0] if len(cross) > 1 else last + 1,
        }
    except KeyError as error:
        msg = f"{job.source}: a Q-Former without {error.args[0]}"
        raise DataError(msg) from None
    sizes |= {"instruct": "words.weight" in found, "norm": "norm.weight" in found}
    if sizes["instruct"] and "places.weight" in found:
        positions = len(found["places.weight"])
        sizes |= {"words": len(found["words.weight"]), "positions": positions}
        sizes["text_limit"] = min(128, positions)
    return sizes


def _encoder(job: Job, state: State) -> dict[str, Any]:
    """Return the section of EVA-CLIP: the tower in the checkpoint, or the published one."""
    tower = {name: x.clone() for name, x in state.items() if name.startswith(_TOWER)}
    if not tower or job.encoder or job.checkpoint:
        if tower:
            job.note("vision tower", "not used: --encoder or --checkpoint", *tower.values())
        name = job.encoder or "eva-clip-g"
        half = {"precision": "float16"} if name == "eva-clip-g" else {}
        return encoder_section(name, job.checkpoint, **half)
    save_file(tower, job.out / "encoder.safetensors", {"format": "pt"})
    job.note("vision tower", "encoder.safetensors", *tower.values())
    section = encoder_section("eva-clip-g", None, precision="float16")
    return section | {"checkpoint": "./encoder.safetensors"}


def _account(job: Job, state: State, used: Mapping[str, Tensor]) -> None:
    """Note where every tensor went."""
    job.note("Q-Former and projection", "weights.safetensors", *used.values())
    mine = {name: x for name, x in state.items() if _QFORMER.match(name) and not _HEADS.match(name)}
    if len(mine) > len(used):  # of the last layer's words nobody reads what they become
        where = "not used: words that no later layer reads"
        last = max(int(n.split(".")[4]) for n in mine if n.startswith("Qformer.bert.encoder."))
        end = re.compile(rf"Qformer\.bert\.encoder\.layer\.{last}\.(intermediate|output)\.")
        job.note("Q-Former's words", where, *(x for name, x in mine.items() if end.match(name)))
    for name, tensor in state.items():
        if _WORDS.match(name):
            job.note("language model", "not used: read as --language", tensor)
        elif _HEADS.match(name):
            job.note("heads of the first stage", "not used: it is over", tensor)
        elif name not in mine and not name.startswith(_TOWER):
            job.note(name, "not used: unknown here", tensor)
