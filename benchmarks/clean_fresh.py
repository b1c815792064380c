"""How well cleaning tells human pathology from the rest, on images and captions it never saw.

The rule's numbers and the lexicon were made with sight of the sets of `clean_set.py`, its part
`test` too, so that is no test of them any more. Here lung patches are of groups that set did not
draw, charts of kinds it does not draw, photographs and scans of packages and files it does not use
(PHOTOS: files of scikit-image, mahotas, matplotlib, scipy 1.9 and pydicom as images), and
captions were written without a look at the lexicon. Nothing may be changed for what comes out.
Models that are dear see SOME images and captions, drawn at random. Prints one JSON line.

    python benchmarks/clean_fresh.py DATA MADE OUT PHOTOS [--encoder mini-clip] [--vlm NAME]
        [--llm NAME] [--some 60]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from clean_set import Case, cases, of_images, saved, told
from mini_clip_data import Pixels, crops, read_table, resized, to_rgb
from PIL import Image

from pathcli.curation.judges import ByColour, ByEncoder, ByLanguage, ByLexicon, ByVision, Verdict
from pathcli.curation.models import open_model
from pathcli.data.images import read_image
from pathcli.encoders.build import build_encoder, text_encoder
from pathcli.metrics.statistics import wilson

SEED = 2027
CHARTS_EACH, GROUPS, CELLS = 6, 120, 24

ANIMALS = (
    "Coronal brain section of an APP/PS1 transgenic mouse with amyloid plaques (thioflavin S)",
    "Aortic root of an ApoE-/- mouse after 16 weeks on a Western diet, oil red O",
    "BALB/c mice: footpad lesion with amastigotes in macrophages",
    "Subcutaneous tumor from athymic nude mice injected with HCT116 cells, day 21",
    "Glomeruli of db/db mice show mesangial expansion (PAS, x400)",
    "Bleomycin-treated murine lung with patchy fibrosis and lost alveolar architecture",
    "Liver from CCl4-treated rats, bridging fibrosis on Masson trichrome",
    "Myocardial infarct border in Lewis rats two weeks after ligation of the LAD",
    "Rat uterine horn, proestrus, tall columnar epithelium",
    "Sciatic nerve of a Long-Evans rat after crush injury; toluidine blue semithin section",
    "Cornea of a New Zealand White rabbit following alkali burn",
    "Leporine VX2 carcinoma implanted in the liver, central necrosis",
    "Swine coronary artery with in-stent neointima at 28 days",
    "Yorkshire pig skin, partial thickness burn with re-epithelialization",
    "Boar spermatozoa in the lumen of the epididymis",
    "Beagle dogs dosed orally for 13 weeks: hepatocellular hypertrophy",
    "Labrador, 9 years, haired skin mass composed of round cells with metachromatic granules",
    "Osteosarcoma of the distal radius in a Rottweiler; abundant osteoid",
    "Domestic shorthair with oral squamous cell carcinoma beneath the tongue",
    "Kitten intestine with parvoviral crypt necrosis",
    "Holstein heifer: granulomatous enteritis due to Johne's disease, acid-fast bacilli",
    "Bovine spongiform encephalopathy, vacuolated neuropil of the obex",
    "Ewes infected with Chlamydia abortus: necrotic placentitis",
    "Caprine arthritis encephalitis, demyelinated spinal cord",
    "Thoroughbred with strangles: lymph node abscess",
    "Foal lung, Rhodococcus equi pneumonia",
    "Rhesus macaque lung infected with M. tuberculosis, caseating granuloma",
    "African green monkeys challenged with Marburg virus: hepatocellular necrosis",
    "Baboon placenta at term",
    "Danio rerio, transverse section of the adult gut",
    "Salmon heart with cardiomyopathy syndrome, inflamed spongy layer",
    "Carp gill with Ichthyophthirius trophonts",
    "Chick embryo limb bud, stage 24, sagittal",
    "Turkeys with histomoniasis: caecal cores and hepatic necrosis",
    "Duck liver, aflatoxicosis with bile duct proliferation",
    "Axolotl blastema seven days after amputation",
    "Leopard frog kidney, Lucke tumor",
    "Bearded dragon with periocular neuroendocrine carcinoma",
    "Honeybee midgut epithelium filled with Nosema spores",
    "Aedes mosquito salivary glands, infected with dengue virus",
    "Caenorhabditis elegans gonad, DAPI",
    "Oyster digestive gland with Perkinsus",
    "Maize root cross section stained with safranin and fast green",
    "Lily anther with meiotic pollen mother cells",
    "Mink lungs after SARS-CoV-2 infection, diffuse alveolar damage",
    "Naked mole-rat skin, thick epidermis",
    "Bat brain with Negri bodies",
    "Koala with lymphoid leukaemia, marrow infiltration",
    "Camel calf with dermatophilosis",
    "Knockout animals lacked goblet cells whereas wild-type littermates had normal crypts",
)
HUMANS = (
    "Invasive ductal carcinoma, grade 3, stained with a mouse monoclonal antibody to p53",
    "Rabbit monoclonal anti-PD-L1 (SP263) labels more than half of the tumour cells",
    "Sections were blocked in goat serum before incubation; renal biopsy with IgA deposits",
    "Donkey anti-mouse Alexa 488 was applied; human skin with linear IgG at the junction",
    "Immunoperoxidase with horse serum block: CD3-positive lymphocytes in the portal tract",
    "The diagnosis of a 'horse-shoe' thymus was an incidental finding in this infant",
    "Chicken-fat clot within the pulmonary artery at autopsy of an elderly man",
    "Oligodendroglioma with branching chicken-wire vessels",
    "Toxoplasma cyst in the brain of a man with AIDS who kept cats",
    "Lymph node of a farmer with tularaemia acquired while skinning hares",
    "Cysticercus in skeletal muscle of a woman who had eaten undercooked pork",
    "Ocular toxocariasis in a child exposed to puppies",
    "Trichinosis after a meal of bear meat: larva in the deltoid",
    "Cutaneous anthrax in a wool sorter, oedema and haemorrhage",
    "Orf nodule on the finger of a shepherd",
    "Milker's nodule, intracytoplasmic inclusions in keratinocytes",
    "Psittacosis pneumonia in a pet shop owner",
    "Fish-mouth stenosis of the mitral valve, calcified leaflets",
    "Fishbone stuck in the tonsil with suppuration",
    "Leonine facies: dense dermal infiltrate in lepromatous leprosy",
    "Café-au-lait macule and neurofibroma with wavy nuclei",
    "Bull's-eye maculopathy, loss of photoreceptors around the fovea",
    "Buffalo hump of a patient with Cushing syndrome; mature fat",
    "Pigeon chest corrected; costal cartilage without change",
    "Monkeypox pustule on the hand of a traveller, Guarnieri-like bodies",
    "Cowpox infection in a veterinary nurse, epidermal necrosis",
    "Goose flesh-like papules of keratosis pilaris, plugged follicles",
    "Crab louse attached to a pubic hair, dermis with eosinophils",
    "Spider bite of the calf with necrotic eschar",
    "Ant-egg shaped calcifications in the pineal gland",
    "Butterfly glioma crossing the corpus callosum, palisading necrosis",
    "Onion bulb formation in a sural nerve biopsy, CIDP",
    "Orange-peel skin above a mammary carcinoma, tumour emboli in lymphatics",
    "Nutmeg liver in right heart failure, centrilobular congestion",
    "Strawberry cervix with Trichomonas on the Pap smear",
    "Rice bodies removed from the shoulder joint",
    "Cauliflower-like verrucous carcinoma of the penis",
    "Apple-green birefringence of amyloid in the kidney, Congo red",
    "Tree-bark appearance of the syphilitic aorta",
    "Mushroom-shaped uveal melanoma breaking through Bruch's membrane",
    "Warthin tumour: oncocytic bilayer and lymphoid stroma",
    "Crypts are tortuous in this rectal biopsy of a patient with colitis",
    "Hürthle cell nodule of the thyroid, abundant granular cytoplasm",
    "Mouse-ear shaped focus of adenocarcinoma, Gleason 3+3",
    "Organoid nests of chief cells, paraganglioma of the carotid body",
    "A xenograft valve (bovine pericardium) taken out of a 64-year-old patient with endocarditis",
    "The transplanted kidney was biopsied because of rising creatinine; tubulitis",
    "Peripheral smear of a boy with sickle cell disease",
    "Melanoma cells grow in nests along the junction, S100 positive",
    "Tigroid background of a seminoma on a touch imprint",
)


def chart(kind: str, rng: np.random.Generator) -> Pixels:
    """Return a drawn chart [224, 224, 3] of a kind that `clean_set.py` does not draw."""
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after clean_set set the backend

    polar = {"projection": "polar"} if kind == "polar" else {}
    figure, axes = plt.subplots(figsize=(3, 3), dpi=75, subplot_kw=polar)
    x, maps = (
        np.linspace(0, 9, 30),
        ("inferno", "PuRd", "coolwarm", "Purples", "summer", "twilight"),
    )
    shades, field = str(rng.choice(maps)), rng.normal(size=(12, 12)).cumsum(0).cumsum(1)
    draw: dict[str, Callable[[], Any]] = {
        "contours": lambda: axes.contourf(field, cmap=shades),
        "stems": lambda: axes.stem(x, rng.uniform(size=30)),
        "polar": lambda: axes.bar(x[:12], rng.uniform(size=12), width=0.5),
        "hexagons": lambda: axes.hexbin(*rng.normal(size=(2, 900)), gridsize=14, cmap=shades),
        "areas": lambda: axes.stackplot(x, rng.uniform(size=(4, 30))),
        "arrows": lambda: axes.quiver(*np.gradient(field)),
        "errors": lambda: axes.errorbar(
            x[:9], rng.uniform(size=9), rng.uniform(0, 0.2, 9), fmt="o"
        ),
        "streams": lambda: axes.streamplot(
            np.arange(12), np.arange(12), *np.gradient(field), color="purple"
        ),
        "survival": lambda: [axes.step(x, np.sort(rng.uniform(size=30))[::-1]) for _ in "ab"],
        "boxes joined": lambda: [
            axes.annotate(
                word, xy, tuple(rng.uniform(size=2)), arrowprops={"arrowstyle": "->"}, bbox={}
            )
            for word, xy in (
                ("patients", (0.2, 0.9)),
                ("excluded", (0.8, 0.5)),
                ("n = 84", (0.3, 0.1)),
            )
        ],
        "words": lambda: axes.text(0, 0, "\n".join(rng.choice(HUMANS, 12)), size=5),
        "genes": lambda: axes.imshow(rng.normal(size=(40, 12)), cmap="RdBu_r", aspect="auto"),
    }
    draw[kind]()
    if kind in {"boxes joined", "words"}:
        axes.axis("off")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    plt.close(figure)
    return resized(pixels)


KINDS = (
    *("contours", "stems", "polar", "hexagons", "areas", "arrows", "errors", "streams"),
    *("survival", "boxes joined", "words", "genes"),
)


def cells(rng: np.random.Generator) -> Pixels:
    """Return nuclei and fibres that glow in two or three dyes on black, drawn [224, 224, 3]."""
    import cv2  # noqa: PLC0415

    image = np.zeros((224, 224, 3), np.float32)
    for channel in rng.permutation(3)[: rng.integers(2, 4)]:
        plane = np.zeros((224, 224), np.float32)
        for _ in range(int(rng.integers(8, 40))):
            at = tuple(int(v) for v in rng.integers(0, 224, 2))
            size = (int(rng.integers(4, 14)), int(rng.integers(4, 14)))
            light, turn = float(rng.uniform(80, 255)), float(rng.uniform(0, 180))
            if rng.random() < 0.7:
                cv2.ellipse(plane, at, size, turn, 0, 360, light, -1)
            else:
                end = tuple(int(v) for v in rng.integers(0, 224, 2))
                cv2.line(plane, at, end, light, 1)
        image[..., channel] = cv2.GaussianBlur(plane, (0, 0), 1.5)
    noisy = image + rng.normal(6, 3, image.shape)
    return np.asarray(noisy.clip(0, 255), np.uint8)


def fresh(data: Path, made: Path, out: Path, photos: Path) -> Iterator[Case]:
    """Yield the images: one of each of `GROUPS` lung groups, and what is no pathology."""
    rng = np.random.default_rng(SEED)
    seen = {case.group for case in cases(made, out / "seen", None, 3)}
    lung = data / "lc25000-lung"
    rows = {row["group"]: row for row in read_table(lung / "labels.csv")}
    split = {row["group"]: row["split"] for row in read_table(made / "labels.csv")}
    left = sorted(group for group in rows if group not in seen and split.get(group) == "test")
    for group in sorted(rng.permutation(left)[:GROUPS]):
        yield Case(lung / rows[group]["image"], good=True, group=group, part="fresh")
    for kind in KINDS:
        drawn = [chart(kind, rng) for _ in range(CHARTS_EACH)]
        yield from saved(out / "images", drawn, f"chart-{kind.replace(' ', '-')}", "fresh")
    for number in range(CELLS):
        yield from saved(out / "images", [cells(rng)], f"glow-{number}", "fresh")
    for path in sorted(photos.iterdir()):
        with Image.open(path) as image:
            pixels = to_rgb(np.asarray(image.convert("RGB")))
        yield from saved(out / "images", crops(pixels, most=6), f"photo-{path.stem}", "fresh")


def of_captions(
    judge: Callable[[Sequence[str]], list[Verdict]], some: int | None
) -> dict[str, Any]:
    """Return precision and recall of what is dropped of the captions, `some` of each."""
    rng = np.random.default_rng(SEED)
    drawn = [rng.permutation(texts)[: some and some // 2].tolist() for texts in (ANIMALS, HUMANS)]
    found = [judge(texts) for texts in drawn]
    hits, wrong = (sum(bool(v.out) for v in each) for each in found)
    return {
        "captions": sum(map(len, drawn)),
        "undecided": sum(v.out is None for each in found for v in each),
        "precision": told(wilson(hits, hits + wrong)),
        "recall": told(wilson(hits, len(drawn[0]))),
        "lost": told(wilson(wrong, len(drawn[1]))),
        "missed": [t for t, v in zip(drawn[0], found[0], strict=True) if not v.out],
        "mistaken": [t for t, v in zip(drawn[1], found[1], strict=True) if v.out],
    }


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "made", "out", "photos"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--encoder")
    parser.add_argument("--vlm")
    parser.add_argument("--llm")
    parser.add_argument("--some", type=int, default=60)
    given = parser.parse_args()
    every = list(fresh(given.data, given.made, given.out, given.photos))
    drawn = np.random.default_rng(SEED).permutation(len(every))[: given.some]
    few = [every[i] for i in sorted(drawn)]
    line: dict[str, Any] = {"benchmark": "clean_fresh", "images": {}, "captions": {}}

    def seen(name: str, judge: Any, some: Sequence[Case]) -> None:  # noqa: ANN401 - an ImageJudge
        verdicts = [v for c in some for v in judge([str(c.path)], [read_image(str(c.path))])]
        kinds = sorted(
            {
                c.group.split("-")[0]
                for c, v in zip(some, verdicts, strict=True)
                if bool(v.out) == c.good
            }
        )
        line["images"][name] = of_images(some, verdicts) | {"wrong among": kinds}

    seen("rule", ByColour(), every)
    line["captions"]["lexicon"] = of_captions(ByLexicon(), None)
    if given.encoder:
        encoder = text_encoder(build_encoder(given.encoder))
        encoder.load("cpu")
        seen(given.encoder, ByEncoder(encoder), every)
    if given.vlm:
        seen(given.vlm, ByVision(open_model(given.vlm, unfamiliar="keep")), few)
        seen("rule, the same", ByColour(), few)
    if given.llm:
        line["captions"][given.llm] = of_captions(ByLanguage(open_model(given.llm)), given.some)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
