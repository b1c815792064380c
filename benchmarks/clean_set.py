"""How well cleaning tells human pathology from the rest, on a mixed set whose truth is known.

Images: patches of lung, colon and eight colorectal tissues, tiles of skin; against fluorescence,
photographs, other scans and drawn charts. The pictures are those of `mini_clip_data.py`, its
`OUT` being given; squares of one source are drawn anew together. The rule's numbers were chosen
on part `chosen` (what mini-clip was trained and gated on, lung of its train groups, three kinds
of charts), and `test` is the rest. Captions: written below by the lexicon's author, after the
lexicon, so its recall is that of an author who knows the list; and captions of PathGen (DATA),
all of human slides, which show what it drops by mistake. Prints one JSON line and writes OUT2.

    python benchmarks/clean_set.py DATA OUT OUT2 [--photos DIR] [--encoder mini-clip] [--vlm NAME]
        [--llm NAME] [--each 3]
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from mini_clip_data import Pixels, crops, resized, to_rgb
from numpy.typing import NDArray
from PIL import Image

from pathcli.curation.judges import ByColour, ByLexicon, Verdict
from pathcli.data.images import read_image
from pathcli.evals.tile_sheet import sheet
from pathcli.metrics.statistics import Interval, bootstrap, wilson

mpl.use("Agg")

TISSUE = ("ihc", "skin", "unstated-", "slide-cmu-1", "slide-os-1", "kather-")
LEFT_OUT = (
    "synthetic-",
    "kather-08",
    "slide-thumb",
    "slide-tcia",
    "slide-diagnostic",
    "slide-tcga",
    "slide-wsi",
)
CHOSEN_CHARTS = ("line", "bar", "heat")
CHARTS = (*CHOSEN_CHARTS, "scatter", "steps", "pie", "histogram", "boxes", "table", "violin")
CHARTS_EACH = 8
COLOURS = ("tab:blue", "purple", "pink", "plum", "teal", "crimson", "grey")
MAPS = ("viridis", "magma", "Blues", "RdPu", "cool", "plasma")

ANIMALS = (
    "Liver of a C57BL/6 mouse fed a high-fat diet for twelve weeks, with macrovesicular steatosis",
    "Representative sections of lungs of infected mice seven days after inoculation",
    "Murine spleen with expanded white pulp",
    "H&E of xenograft tumours grown in nude mice and treated with vehicle or drug",
    "Sections of rat kidneys after ischaemia and reperfusion",
    "Wistar rats: testis with degenerating seminiferous tubules",
    "Hippocampus of Sprague-Dawley rats, Nissl stain",
    "Rabbit articular cartilage eight weeks after implantation of the scaffold",
    "Rabbits' aortas after a cholesterol diet",
    "Skin wounds of piglets on day 14 under the dressing",
    "Porcine retina after laser treatment",
    "Mini-pigs received implants in the mandible; ground section",
    "Canine mammary carcinoma, simple type, with necrosis",
    "Dogs with lymphoma: effaced node",
    "Splenic haemangiosarcoma of a golden retriever",
    "Feline infectious peritonitis: pyogranulomas around vessels of the kidney",
    "Injection-site sarcoma in a cat",
    "Bovine placentome with binucleate trophoblasts",
    "Cows with mastitis: alveoli full of neutrophils",
    "Ovine pulmonary adenocarcinoma in a sheep",
    "Tendon of a goat, six months after repair",
    "Equine sarcoid: fibroblasts below a hyperplastic epidermis",
    "Hoof lamellae of horses with laminitis",
    "Macaques infected with SIV: depleted mesenteric node",
    "Cynomolgus monkey, minimal infiltrates in the heart",
    "Zebrafish larvae at five days after fertilisation, sagittal section",
    "Gills of rainbow trout with hyperplasia of the lamellae",
    "Tilapia spleen with melanomacrophage centres",
    "Broiler chickens: bursa of Fabricius with lymphoid depletion",
    "Quail embryo neural tube, transverse section",
    "Xenopus oocytes in section",
    "Drosophila midgut with proliferating stem cells",
    "Ferrets infected with influenza: bronchiolitis",
    "Syrian hamsters, cheek pouch carcinoma after DMBA",
    "Guinea pig cochlea, organ of Corti",
    "Gerbils colonised with H. pylori: gastric erosions",
    "Arabidopsis root tip, longitudinal section",
    "Sea turtle fibropapilloma",
    "A veterinary case of cutaneous mast cell tumour",
    "Anti-Ki67 staining of mouse intestine with a rabbit antibody",
    "Ileum of newborn calves with cryptosporidiosis",
    "Lamb kidney with interstitial nephritis",
    "Bull testis, seminiferous epithelium",
    "Planarian flatworm, regenerating head",
    "Sea urchin gastrula in section",
    "Hens' oviducts after infection with bronchitis virus",
    "Alpacas with hepatic lipidosis",
    "Tobacco leaf mesophyll, toluidine blue",
    "Tasmanian devil facial tumour",
    "Transgenic K-ras animals developed adenomas of the lung",
)
HUMANS = (
    "Mouse anti-human CD20 marks the neoplastic B cells of this nodal lymphoma",
    "Cytokeratin by a rabbit polyclonal antibody; haematoxylin counterstain",
    "Goat anti-rabbit and horse anti-mouse secondary antibodies were used on the biopsy",
    "HER2 FISH shows clusters of red signals in the invasive carcinoma",
    "The gastrointestinal stromal tumour is positive for DOG-1 and CD117",
    "DOG1 and KIT are expressed by spindle cells of the stomach",
    "Horseshoe kidney with a renal cell carcinoma of the isthmus",
    "Oligodendroglioma with a chicken-wire network of capillaries and fried-egg cells",
    "Chondroblastoma with chicken wire calcification",
    "Owl-eye inclusions of cytomegalovirus in endothelial cells",
    "Reed-Sternberg cell with owl's eye nucleoli",
    "Cat scratch disease: stellate microabscesses of an axillary lymph node of a boy",
    "Node of a child scratched by her cat, Warthin-Starry stain",
    "Rat-bite fever: leukocytoclastic vasculitis of the skin",
    "Skin of a patient with monkeypox, ballooning keratinocytes",
    "Chickenpox: intranuclear inclusions in epidermal cells",
    "Lung of a patient who died of swine flu, hyaline membranes",
    "Avian influenza in a farmer: diffuse alveolar damage",
    "Colonic mucosa with adherent E. coli and ulcers",
    "Bird-fancier's lung: poorly formed granulomas",
    "Pigeon breeder's disease, lymphocytic interstitial infiltrate",
    "Fish-flesh appearance of the cut surface, sheets of small round cells",
    "Fish tank granuloma of the hand due to Mycobacterium marinum",
    "Perforation of the ileum by a fish bone, with abscess",
    "Butterfly rash; interface dermatitis in lupus",
    "Impacted maxillary canine with a dentigerous cyst",
    "Abscess of the calf after injection",
    "Bovine pericardial valve explanted after ten years, calcified cusps",
    "Porcine bioprosthetic valve with pannus, from a woman of 70",
    "Cells were cultured from the tumour in fetal bovine serum",
    "Horseradish peroxidase and DAB show the antigen in plasma cells",
    "Rheumatoid nodule; anti-mouse IgG served as negative control",
    "Joint mice removed from the knee: cartilage with a calcified core",
    "Rhesus-negative mother: hydropic placenta, many nucleated red cells",
    "Dog bite of the lip with pseudoepitheliomatous hyperplasia",
    "Hydatid cyst of the liver, dog tapeworm, laminated membrane",
    "Bird's-eye view of a polyp with a broad base",
    "Swan-like neck of the pancreas; normal islets",
    "Elephantiasis: dilated dermal lymphatics and fibrosis",
    "Sonic hedgehog signalling is active in this basal cell carcinoma",
    "Pigmented villonodular synovitis with haemosiderin",
    "Herringbone fascicles of a fibrosarcoma",
    "Cobblestone mucosa in Crohn's disease, fissuring ulcer",
    "Spider naevus: dilated central arteriole",
    "Lepidic growth along alveolar septa",
    "Strawberry gallbladder: foamy macrophages below the epithelium",
    "Zebra bodies in the foam cells of a patient with Fabry disease",
    "Snail-track ulcers of the mucosa in secondary syphilis",
    "The patient kept parrots and had granulomas of the lung",
    "He fell off a horse; haematoma of the spleen with organising clot",
    "Unlike in mouse models, human islets show amyloid",
    "Dog-bone shaped crystals in a histiocyte",
    "Lobster-claw deformity, amputated toe, normal bone",
    "Worm-like masses of Ascaris in the common bile duct",
    "Sheep-liver-fluke eggs with granulomas in the liver of a shepherd",
)


class Case(NamedTuple):
    """An image: where it is, whether it is pathology, its source, and its part of the set."""

    path: Path
    good: bool
    group: str
    part: str


def chart(kind: str, rng: np.random.Generator) -> Pixels:
    """Return a drawn chart [224, 224, 3]."""
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend is set

    figure, axes = plt.subplots(figsize=(3, 3), dpi=75)
    x, colour, shades = np.linspace(0, 9, 40), rng.choice(COLOURS), rng.choice(MAPS)
    draw: dict[str, Callable[[], Any]] = {
        "line": lambda: axes.plot(x, rng.normal(size=(40, 3)).cumsum(0)),
        "bar": lambda: axes.bar(range(6), rng.uniform(size=6), color=colour),
        "heat": lambda: axes.imshow(rng.uniform(size=(9, 9)), cmap=shades),
        "scatter": lambda: axes.scatter(*rng.normal(size=(2, 200)), c=x.repeat(5), cmap=shades),
        "steps": lambda: axes.step(x, np.cumprod(1 - rng.uniform(0, 0.1, 40)), color=colour),
        "pie": lambda: axes.pie(rng.uniform(size=5)),
        "histogram": lambda: axes.hist(rng.normal(size=500), 30, color=colour),
        "boxes": lambda: axes.boxplot(rng.normal(size=(50, 5))),
        "table": lambda: axes.table(rng.integers(0, 99, (8, 4)).astype(str), loc="center"),
        "violin": lambda: axes.violinplot(rng.normal(size=(100, 4))),
    }
    draw[kind]()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    plt.close(figure)
    return resized(pixels)


def cases(made: Path, out: Path, photos: Path | None, each: int) -> Iterator[Case]:
    """Yield the images: of lung `each` of 70 groups a part, of the rest every square."""
    rows = list(csv.DictReader((made / "labels.csv").open(newline="")))
    taken: dict[str, dict[str, int]] = {"chosen": {}, "test": {}}
    for row in rows:
        group, part = row["group"], "test" if row["split"] in {"test", "report"} else "chosen"
        if group.startswith(LEFT_OUT):
            continue
        if row["label"].startswith("lung"):
            counts = taken[part]
            if (group not in counts and len(counts) >= 70) or counts.get(group, 0) >= each:
                continue
            counts[group] = counts.get(group, 0) + 1
        good = row["label"].startswith(("lung", "colon")) or group.startswith(TISSUE)
        yield Case(made / row["image"], good, group, part)
    rng = np.random.default_rng(0)
    for kind in CHARTS:
        part = "chosen" if kind in CHOSEN_CHARTS else "test"
        drawn = [chart(kind, rng) for _ in range(CHARTS_EACH)]
        yield from saved(out, drawn, f"chart-{kind}", part)
    for path in sorted(photos.iterdir()) if photos else ():
        with Image.open(path) as image:
            pixels = to_rgb(np.asarray(image.convert("RGB")))
        yield from saved(out, crops(pixels), f"photo-{path.stem}", "test")


def saved(out: Path, images: Sequence[Pixels], group: str, part: str) -> Iterator[Case]:
    """Write images of one source below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(images):
        path = out / f"{group}-{number:02}.jpg"
        Image.fromarray(pixels).save(path, quality=85)
        yield Case(path, good=False, group=group, part=part)


def told(found: Interval) -> list[float | None]:
    """Return value, low and high."""
    values = (found.value, found.low, found.high)
    return [round(float(v), 3) if np.isfinite(v) else None for v in values]


def of_images(some: Sequence[Case], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return precision and recall of what is dropped, and what is lost, sources drawn anew."""
    out = np.array([bool(v.out) for v in verdicts])
    bad = np.array([not case.good for case in some])
    groups = [case.group for case in some]

    def share(of: NDArray[np.bool_], among: NDArray[np.bool_]) -> list[float | None]:
        def value(i: NDArray[np.intp]) -> float:
            return float(of[i][among[i]].mean()) if among[i].any() else float("nan")

        return told(bootstrap(value, groups, strata=bad.astype(int).tolist()))

    return {
        "images": len(some),
        "sources": len(set(groups)),
        "undecided": sum(v.out is None for v in verdicts),
        "precision": share(bad, out),
        "recall": share(out, bad),
        "lost": share(out, ~bad),
    }


def of_captions(judge: Callable[[Sequence[str]], list[Verdict]]) -> dict[str, Any]:
    """Return precision and recall of what is dropped of the captions above, and the mistakes."""
    missed, lost = ([v.out for v in judge(texts)] for texts in (ANIMALS, HUMANS))
    hits, wrong = sum(map(bool, missed)), sum(map(bool, lost))
    return {
        "precision": told(wilson(hits, hits + wrong)),
        "recall": told(wilson(hits, len(ANIMALS))),
        "lost": told(wilson(wrong, len(HUMANS))),
        "missed": [t for t, found in zip(ANIMALS, missed, strict=True) if not found],
        "mistaken": [t for t, found in zip(HUMANS, lost, strict=True) if found],
    }


def judges(given: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the routes for images by name."""
    yield "rule", ByColour()
    if given.encoder:
        from pathcli.curation.judges import ByEncoder  # noqa: PLC0415
        from pathcli.encoders.build import build_encoder, text_encoder  # noqa: PLC0415

        encoder = text_encoder(build_encoder(given.encoder))
        encoder.load("cpu")
        yield given.encoder, ByEncoder(encoder)
    if given.vlm:
        from pathcli.curation.judges import ByVision  # noqa: PLC0415
        from pathcli.curation.models import open_model  # noqa: PLC0415

        yield given.vlm, ByVision(open_model(given.vlm, unfamiliar="keep"))


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "made", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--encoder")
    parser.add_argument("--vlm")
    parser.add_argument("--llm")
    parser.add_argument("--each", type=int, default=3)
    given = parser.parse_args()
    every = list(cases(given.made, given.out / "images", given.photos, given.each))
    line: dict[str, Any] = {"benchmark": "clean_set", "images": {}, "captions": {}}
    for name, judge in judges(given):
        verdicts = []
        for case in every:
            verdicts += judge([str(case.path)], [read_image(str(case.path))])
        for part in ("chosen", "test"):
            rows = [i for i, case in enumerate(every) if case.part == part]
            of = ([every[i] for i in rows], [verdicts[i] for i in rows])
            line["images"][f"{name}, {part}"] = of_images(*of)
        wrong = [i for i, c in enumerate(every) if bool(verdicts[i].out) == c.good][:40]
        shown = [read_image(str(every[i].path)) for i in wrong]
        under = [(every[i].group, verdicts[i].why or "kept") for i in wrong]
        Image.fromarray(sheet(shown, under)).save(given.out / f"wrong-{name}.png")
    line["captions"]["lexicon"] = of_captions(ByLexicon())
    records = json.loads((given.data / "captions" / "pathgen-sample.json").read_text())
    dropped = [v.why for v in ByLexicon()([r["caption"] for r in records]) if v.out]
    line["captions"]["lexicon on PathGen"] = [len(dropped), len(records), dropped]
    if given.llm:
        from pathcli.curation.judges import ByLanguage  # noqa: PLC0415
        from pathcli.curation.models import open_model  # noqa: PLC0415

        line["captions"][given.llm] = of_captions(ByLanguage(open_model(given.llm)))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
