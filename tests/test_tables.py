"""Label tables of every form, and the benchmarks made of them."""

from collections import Counter
from pathlib import Path

import openpyxl
import pytest

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.mil.benchmarks import BENCHMARKS, Published, benchmark
from pathcli.mil.tables import Row, label_table, read_labels, slide_name

CLAM = "case_id,slide_id,label\np1,a.svs,tumor\np1,b.tif,normal\n\np2,c,normal\n"
ROWS = (Row("p1", "a", "tumor"), Row("p1", "b", "normal"), Row("p2", "c", "normal"))


def write(name: str, text: str, encoding: str = "utf-8") -> Path:
    path = Path(name)  # each test runs in a folder of its own
    path.write_text(text, encoding=encoding)
    return path


def book(name: str, **sheets: list[list[object]]) -> Path:
    made = openpyxl.Workbook()
    made.remove(made.active)
    for title, lines in sheets.items():
        page = made.create_sheet(title)
        for line in lines:
            page.append(line)
    made.save(name)
    return Path(name)


def test_a_clam_table_is_read_as_it_is() -> None:
    table = read_labels(write("labels.csv", CLAM))
    assert table.rows == ROWS
    assert table.classes == ("normal", "tumor")
    assert [table.index(row) for row in table.rows] == [1, 0, 0]
    assert table.by_slide["c"] == ROWS[2]
    assert table.source == "labels.csv"
    assert table.warnings == ("patients with slides of different labels: 1 (p1)",)


def test_tabs_a_byte_order_mark_and_windows_lines_change_nothing() -> None:
    expected = read_labels(write("labels.csv", CLAM))
    tabs = read_labels(write("labels.tsv", CLAM.replace(",", "\t")))
    marked = read_labels(write("marked.csv", CLAM.replace("\n", "\r\n"), "utf-8-sig"))
    assert tabs.rows == marked.rows == expected.rows
    assert tabs.digest == marked.digest == expected.digest


def test_a_spreadsheet_of_a_land_of_commas_is_read() -> None:
    expected = read_labels(write("labels.csv", CLAM))
    assert read_labels(write("semicolons.csv", CLAM.replace(",", ";"))).rows == expected.rows


def test_classes_that_differ_in_case_only_are_told() -> None:
    table = read_labels(write("l.csv", "case_id,slide_id,label\na,a,Tumor\nb,b,tumor\nc,c,n\n"))
    assert "classes that differ in case only: 2 (Tumor, tumor)" in table.warnings


def test_a_spreadsheet_gives_the_same_rows_and_whole_numbers_stay_whole() -> None:
    lines = [["case_id", "slide_id", "label", "site"], [7, "a", 1.0, None], [8, "b", 0, 2.0]]
    path = book("labels.xlsx", notes=[["nothing"], ["here"]], cohort=lines)
    table = read_labels(path, sheet="cohort")
    assert table.rows == (Row("7", "a", "1"), Row("8", "b", "0", "2"))
    assert table.classes == ("0", "1")
    with pytest.raises(DataError, match="no sheet is called 'cohrt': did you mean 'cohort'"):
        read_labels(path, sheet="cohrt")
    with pytest.raises(DataError, match="no column 'case_id'"):
        read_labels(path)
    with pytest.raises(UsageError, match="only XLSX files have sheets"):
        read_labels(write("labels.csv", CLAM), sheet="cohort")


def test_sites_and_splits_are_read_under_their_usual_names() -> None:
    text = "idx,Case_ID,slide_id,split_info,centre,label\n0,p,a,Training,3,x\n1,q,b,test,,y\n"
    assert read_labels(write("t.csv", text)).rows == (
        Row("p", "a", "x", "3", "train"),
        Row("q", "b", "y", None, "test"),
    )
    wrong = write("w.csv", text.replace("Training", "tset"))
    with pytest.raises(DataError, match=r"w\.csv: line 2: split 'tset' is none of"):
        read_labels(wrong)


def test_stamps_two_tables_are_joined_by_patient() -> None:
    clinical = "PATIENT,AGE,isMSIH,SITE\nP1,60,MSIH,x\nP2,,nonMSIH,y\nP3,50,NA,y\nP4,1,MSIH,y\n"
    slides = "PATIENT,FILENAME\nP1,sub/one.h5\nP1,two.h5\nP2,three.h5\nP3,four.h5\nP9,nine.h5\n"
    table = read_labels(
        write("clini.csv", clinical), slides=write("slides.csv", slides), target="isMSIH"
    )
    assert table.rows == (
        Row("P1", "one", "MSIH", "x"),
        Row("P1", "two", "MSIH", "x"),
        Row("P2", "three", "nonMSIH", "y"),
    )
    assert table.warnings == (
        "slides left out, no such patient in clini.csv: 1 (nine.h5)",
        "patients without a slide in slides.csv: 1 (P4)",
        "patients left out, column 'isMSIH' is empty: 1 (P3)",
    )
    with pytest.raises(UsageError, match="target"):
        read_labels("clini.csv", slides="slides.csv")
    with pytest.raises(DataError, match=r"no column 'isMSI'; did you mean 'isMSIH'"):
        read_labels("clini.csv", slides="slides.csv", target="isMSI")
    with pytest.raises(DataError, match="line 6: patient P1 is there twice"):
        read_labels(
            write("clini.csv", clinical + "P1,60,nonMSIH,x\n"), slides="slides.csv", target="isMSIH"
        )


def test_a_class_map_names_groups_and_orders_the_classes() -> None:
    lines = "".join(f"p{i},s{i},{i}\n" for i in range(5))
    path = write("t.csv", "case_id,slide_id,label\n" + lines)
    mapping = {"3": "late", "4": "late", "0": "early", "1": "early", "2": "early", "9": "never"}
    table = read_labels(path, classes=mapping)
    assert table.classes == ("late", "early", "never")
    assert [row.label for row in table.rows] == ["early"] * 3 + ["late"] * 2
    assert table.warnings == ("classes without a slide: 1 (never)",)
    with pytest.raises(DataError, match="label 1, 2 in no class"):
        read_labels(path, classes={"0": "a", "3": "b", "4": "b"})


def test_labels_sort_as_people_count() -> None:
    rows = [Row(f"p{label}", f"s{label}", label) for label in ("10", "9", "stage 10", "stage 2")]
    assert label_table(rows, source="t").classes == ("9", "10", "stage 2", "stage 10")


def test_the_digest_knows_every_cell_and_no_order() -> None:
    table = label_table(ROWS, source="a")
    assert label_table(ROWS[::-1], source="b").digest == table.digest
    others = [
        label_table([*ROWS[:2], row], source="a").digest
        for row in (
            Row("p3", "c", "normal"),
            Row("p2", "d", "normal"),
            Row("p2", "c", "tumor"),
            Row("p2", "c", "normal", "s"),
            Row("p2", "c", "normal", None, "test"),
        )
    ]
    swapped = label_table(ROWS, source="a", classes={"tumor": "tumor", "normal": "normal"})
    assert len({table.digest, swapped.digest, *others}) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,slide_id,label\np,a,x\n", r"no column 'case_id'; did you mean 'case'"),
        ("case_id,slide_id,labels\np,a,x\n", r"no column 'label'; did you mean 'labels'"),
        ("case_id,slide_id,label,Label\np,a,x,x\n", r"two columns are called 'label'"),
        ("case_id,slide_id,label\np,a,x\n\nq,,y\n", r"line 4: column 'slide_id' is empty"),
        ("case_id,slide_id,label\np,a,x\nq,b\n", r"line 3: column 'label' is empty"),
        ("case_id,slide_id,label\np,a,x,y\n", r"line 2 has 4 cells, the header 3"),
        ("case_id,slide_id,label\np,a,x\np,a.svs,y\n", r"line 3: slide a has two labels .*line 2"),
        ("case_id,slide_id,label\np,a,x\nq,a,x\n", r"line 3: slide a has two patients"),
        ("case_id,slide_id,label\np,a,x\nq,b,x\n", r"2 slides, all of class x; two classes"),
        ("case_id,slide_id,label\n", r"no rows"),
        ("", r"no rows"),
    ],
)
def test_a_faulty_table_says_what_and_where(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_labels(write("faulty.csv", text))
    assert str(caught.value).startswith("faulty.csv: ")


def test_files_that_are_no_tables_are_data_errors() -> None:
    with pytest.raises(DataError, match="no such file"):
        read_labels("nowhere.csv")
    Path("binary.csv").write_bytes(b"\xff\xfe\x00case")
    with pytest.raises(DataError, match="not a CSV, TSV or XLSX table in UTF-8"):
        read_labels("binary.csv")
    with pytest.raises(DataError, match="not an XLSX file"):
        read_labels(write("fake.xlsx", CLAM))


def test_a_repeated_row_is_dropped_and_counted() -> None:
    table = read_labels(write("t.csv", CLAM + "p2,c.svs,normal\n"))
    assert table.rows == ROWS
    assert "repeated rows dropped: 1 (c)" in table.warnings


def test_only_a_slides_own_suffix_is_taken_off() -> None:
    assert slide_name(" TCGA-AA-1.DX1.5f3c.svs ") == "TCGA-AA-1.DX1.5f3c"
    assert slide_name("TCGA-AA-1.DX1.5f3c") == "TCGA-AA-1.DX1.5f3c"
    assert slide_name("sub\\deep/x.TIFF") == "x"


# --- benchmarks --------------------------------------------------------------------------


def test_camelyon16_ships_its_labels_and_its_test_set() -> None:
    table = benchmark("camelyon16").need_table()
    assert table.classes == ("normal", "tumor")
    assert Counter(row.label for row in table.rows) == {"normal": 239, "tumor": 160}
    assert Counter((row.split, row.label) for row in table.rows if row.split == "test") == {
        ("test", "normal"): 80,
        ("test", "tumor"): 49,
    }
    assert all((row.split == "test") == row.slide.startswith("test_") for row in table.rows)
    assert len(set(table.warnings)) == len(table.warnings) == 1


@pytest.mark.data
def test_the_shipped_table_is_the_published_one(data: Path) -> None:
    path = data / "camelyon16" / "labels.csv"
    ours, theirs = benchmark("camelyon16").need_table(), benchmark("camelyon16", path).need_table()
    assert ours.digest == theirs.digest
    raw = read_labels(path, classes={"0": "normal", "1": "tumor"})
    assert {(r.case, r.slide, r.label) for r in raw.rows} == {
        (r.case, r.slide, r.label) for r in ours.rows
    }


def test_camelyon17_is_tested_on_centres_three_and_four() -> None:
    labels = ["negative", "itc", "micro", "macro", "negative"]
    lines = [
        f"patient_{p},patient_{p}_node_{n}.tif,{labels[n]},center_{p}"
        for p in range(5)
        for n in range(5)
    ]
    text = "\n".join(["case_id,slide_id,label,center", *lines])
    table = benchmark("camelyon17", write("c17.csv", text)).need_table()
    assert table.classes == ("negative", "itc", "micro", "macro")
    assert {row.case for row in table.rows if row.split == "test"} == {"patient_3", "patient_4"}
    binary = benchmark("camelyon17", classes={"0": "free", "1": "metastasis"})
    assert binary.classes == ("free", "metastasis")
    numbers = write("numbers.csv", "case_id,slide_id,label,center\np,a,0,1\nq,b,1,3\n")
    with pytest.raises(DataError, match="label 0, 1 in no class; map every label"):
        benchmark("camelyon17", numbers)
    with pytest.raises(DataError, match=r"slide a has no site; .*center \(0 to 4\)"):
        benchmark("camelyon17", write("bare.csv", "case_id,slide_id,label\np,a,itc\nq,b,micro\n"))
    home = text.replace("center_3", "center_0").replace("center_4", "center_1")
    with pytest.raises(DataError, match="no test slide; by the rule they are the 200 slides"):
        benchmark("camelyon17", write("home.csv", home))


def test_bracs_has_three_classes_of_seven_labels() -> None:
    lines = [f"{i},p{i},BRACS_{i},{'test' if i > 4 else 'train'},x,{i}" for i in range(7)]
    text = "\n".join(["idx,case_id,slide_id,split_info,full_path,label", *lines])
    table = benchmark("bracs", write("bracs.csv", text)).need_table()
    assert table.classes == ("benign", "atypical", "malignant")
    assert [table.index(row) for row in table.rows] == [0, 0, 0, 1, 1, 2, 2]
    assert [row.split for row in table.rows] == ["train"] * 5 + ["test"] * 2


@pytest.mark.parametrize("name", ["camelyon17", "bracs"])
def test_a_benchmark_without_labels_says_which_file_it_needs(name: str) -> None:
    found = benchmark(name)
    with pytest.raises(ResourceError, match="give a table with the columns case_id, slide_id") as e:
        found.need_table()
    assert found.publisher in str(e.value)


def test_an_unknown_benchmark_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'bracs'"):
        benchmark("brcas")


def test_every_published_number_has_a_source() -> None:
    for name in BENCHMARKS:
        for row in benchmark(name).published:
            assert isinstance(row, Published)
            assert 0 < row.value < 1
            assert "arXiv:" in row.source
    abmil = {
        r.metric: (r.value, r.sd) for r in benchmark("camelyon16").published if r.head == "abmil"
    }
    assert abmil == {"f1": (0.914, 0.031), "auroc": (0.945, 0.027)}
