"""Every cell of the compatibility matrix, and the document that is made of it."""

import cells
import matrix
import pytest
from tiny import one_thread  # noqa: F401 (a fixture)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gru_memory import supported_model_types


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its heir is new in transformers 5.23
@pytest.mark.parametrize(
    "feature",
    [pytest.param(f, id=f.name, marks=[pytest.mark.slow] if f.slow else []) for f in matrix.FEATURES],
)
@pytest.mark.parametrize("row", cells.ROWS, ids=lambda row: row.name)
def test_cell(row, feature):
    cells.run_cell(row, feature)


def test_every_family_has_a_row():
    families = {row.family for row in cells.ROWS}
    assert families == {family for family in supported_model_types() if family in CONFIG_MAPPING}
    assert all(row.base().config.model_type == row.family for row in cells.ROWS)


def test_features_have_names_of_their_own():
    names = [feature.name for feature in matrix.FEATURES]
    assert len(set(names)) == len(names)


def test_refusals_are_of_rows_that_exist():
    names = {row.name for row in cells.ROWS} | {row.family for row in cells.ROWS}
    for feature in matrix.FEATURES:
        assert set(feature.refused) <= names, feature.name
    assert {*cells.SINGLE, *cells.PARTLY_SINGLE} <= names


def test_the_document_is_that_of_the_matrix():
    assert matrix.DOCUMENT.read_text(encoding="utf-8") == matrix.render(), "run: make compatibility"
