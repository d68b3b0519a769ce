"""What the service says of itself holds: requests made from its own description, good and bad ones."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.running import running
from tests.serving.test_pictures import base64_of, digit_picture, encoded

pytestmark = pytest.mark.service
PICTURE = base64_of(encoded(digit_picture(0)))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def brief(small, small_classifier):
    """Run a server that writes little."""
    with running(small, max_new_tokens=3, classifier=("filter", lambda: small_classifier)) as found:
        yield found


@pytest.fixture(scope="module")
def operations(brief):
    """Return the operations of the description, with the names of models and a picture that are there."""
    raw = brief.client.get("/openapi.json").json()
    for schema in raw["components"]["schemas"].values():
        if "model" in schema.get("properties", {}) and "object" not in schema["properties"]:
            schema["properties"]["model"] = {
                "enum": ["filter", None] if schema["title"] == "ClassifyRequest" else ["small"]
            }
    # What is drawn at random is hardly ever a picture, or the one width that vectors have; so both are given.
    schemas = raw["components"]["schemas"]
    schemas["ClassifyRequest"]["properties"]["image"] = {"enum": [PICTURE, [PICTURE, PICTURE], "no picture"]}
    width = brief.service.model.config.emb_dim
    schemas["EmbeddingRequest"]["properties"]["dimensions"] = {"enum": [None, width, width + 1]}
    found = [result.ok() for result in schemathesis.openapi.from_dict(raw).get_all_operations()]
    assert len(found) == 9
    return found


@pytest.mark.parametrize(("mode", "n"), [(GenerationMode.POSITIVE, 20), (GenerationMode.NEGATIVE, 12)])
def test_no_fault_of_the_server_and_no_status_it_does_not_tell(brief, operations, mode, n):
    seen = set()
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method.lower() == "get":
            continue  # a path without parameters cannot be wrong

        @settings(
            max_examples=n,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            response = case.call_and_validate(base_url=brief.url, checks=CHECKS)
            seen.add((case.operation.path, response.status_code))
            if isinstance(case.body, dict) and isinstance(case.body.get("image"), str | list):
                seen.add(("a picture", response.status_code))

        check()
    if mode is GenerationMode.POSITIVE:
        served = {path for path, status in seen if status == 200}
        assert {
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/embeddings",
            "/v1/classify",
            "a picture",
        } <= served
    else:
        assert {status for _, status in seen} >= {400}
