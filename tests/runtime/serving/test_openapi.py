"""The OpenAPI document tells the truth: Schemathesis sends what it allows and forbids, and checks the answers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.serving import serving
from tests.support.tiny_models import mean_fill

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install 'misf[dev]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    model = mean_fill(tmp_path_factory.mktemp("model") / "mean.onnx")
    with serving(model, max_pixels=200_000, max_bytes=1 << 20) as client:
        yield client


def operations(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}


def test_the_document_names_what_comes_back(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert ("POST", "/inpaint") in operations(document)
    assert len(operations(document)) == 16
    for path in ("/inpaint", "/api/v1/inpaint"):
        answers = document["paths"][path]["post"]["responses"]
        assert answers["200"]["content"]["image/png"]["schema"] == {"type": "string", "format": "binary"}
        assert set(answers) >= {"200", "400", "413", "415", "422", "500", "503", "504"}
        failure = answers["503"]["content"]["application/json"]["schema"]
        assert failure == {"$ref": "#/components/schemas/Failure"}
    form = document["components"]["schemas"]["Body_inpaint_inpaint_post"]
    assert set(form["required"]) == {"image", "mask"}


def test_schemathesis_finds_no_answer_that_is_not_documented(client: httpx.Client) -> None:
    import hypothesis
    from schemathesis.checks import (
        content_type_conformance,
        not_a_server_error,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    tried: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(case=operation.as_strategy() | operation.as_strategy(schemathesis.GenerationMode.NEGATIVE))
        def try_it(case: Any) -> None:
            response = case.call(base_url=str(client.base_url).rstrip("/"))
            tried.setdefault(case.operation.label, set()).add(response.status_code)
            case.validate_response(response, checks=checks)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Hypothesis, for strategies that filter much
            try_it()
    assert len(tried) == 16
    assert {status for statuses in tried.values() for status in statuses} >= {200, 400, 415, 422}
    assert client.get("/readyz").status_code == 200
