"""What an OpenAPI document can't say, told to schemathesis as its hooks: what an image is, what headers are for."""

import base64
from typing import Any

import schemathesis
from hypothesis import strategies as st

from service.explanation.masks import RUNS
from service.settings import Settings
from tests.fakes import HEIGHT, WIDTH, tiny_metadata
from tests.imaging.files import all_files, pixels

FILES = list(all_files(pixels(9, 13)).values())
MAX_IMAGES = Settings.model_fields["max_images"].default
MAX_EXPLAINED = Settings.model_fields["explain_max_runs"].default // (1 + RUNS)
PIXELS = {"name": "images", "datatype": "UINT8", "shape": [1, HEIGHT, WIDTH, 3], "data": [7] * HEIGHT * WIDTH * 3}
INFERS = [
    {
        "inputs": [
            {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(FILES[0]).decode()]}
        ]
    },
    {"inputs": [PIXELS], "id": "a", "outputs": [{"name": "probabilities", "parameters": {"classification": 2}}]},
    {"inputs": [PIXELS], "outputs": [{"name": "logits", "parameters": {"binary_data": False}}], "parameters": {}},
]
HEADERS = {"x-request-id", "x-request-timeout-ms", "x-api-key", "authorization", "content-type", "accept"}

for media_type in ("image/*", "application/octet-stream"):
    schemathesis.openapi.media_type(media_type, st.sampled_from(FILES))
schemathesis.openapi.format("binary", st.sampled_from(FILES))


@schemathesis.hook
def before_load_schema(context: object, raw_schema: dict[str, Any]) -> None:
    """Take real images for base64: no other string is valid."""
    paths = raw_schema["paths"]
    image = {"enum": [base64.b64encode(data).decode() for data in FILES]}
    for path in ("/predict", "/explain", "/embed"):
        for form in paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["oneOf"]:
            if "image" in form["properties"]:
                form["properties"]["image"] = image
            else:
                form["properties"]["images"]["items"] = image
    for parameter in paths["/explain"]["post"]["parameters"]:
        if parameter["name"] == "label":
            parameter["schema"] = {"type": "string", "enum": list(tiny_metadata().labels)}
    for path, operations in paths.items():
        for operation in operations.values() if path.startswith("/v2/models/{name}") else ():
            name_the_model(operation)
            if path.endswith("/infer"):
                operation["requestBody"]["content"]["application/json"]["schema"] = {"enum": INFERS}


def name_the_model(operation: dict[str, Any]) -> None:
    """Take the live model for the parameters of a path: any other is not there."""
    values = {"name": "tiny", "version": "1"}
    for parameter in operation["parameters"]:
        if parameter["in"] == "path":
            parameter["schema"] = {"type": "string", "enum": [values[parameter["name"]]]}


@schemathesis.hook
def filter_case(context: object, case: Any) -> bool:
    """Leave out what schemathesis takes for wrong, or right, and is not.

    Headers that nobody knows are to be ignored; an empty list leaves no trace in a form; and a document can't say how
    many files all fields of a form may hold together.
    """
    if any(name.lower() not in HEADERS for name in case.headers or {}):
        return False
    if case.media_type != "multipart/form-data" or not isinstance(case.body, dict):
        return True
    sizes = [len(field) for field in case.body.values() if isinstance(field, list)]
    most = MAX_EXPLAINED if case.path == "/explain" else MAX_IMAGES
    return 0 not in sizes and (len(sizes) < 2 or sum(sizes) <= most)
