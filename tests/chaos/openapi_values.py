"""What an OpenAPI document can't say, told to schemathesis as its hooks: what a picture is, what headers are for."""

import base64
from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.service.pictures import all_files, pixels

FILES = list(all_files(pixels(9, 13)).values())
HEADERS = {"x-request-id", "x-request-timeout-ms", "x-api-key", "authorization", "content-type", "accept"}

for media_type in ("image/*", "application/octet-stream"):
    schemathesis.openapi.media_type(media_type, st.sampled_from(FILES))
schemathesis.openapi.format("binary", st.sampled_from(FILES))


@schemathesis.hook
def before_load_schema(context: object, raw_schema: dict[str, Any]) -> None:
    """Take real pictures for base64: no other string is valid."""
    content = raw_schema["paths"]["/predict"]["post"]["requestBody"]["content"]
    picture = {"enum": [base64.b64encode(data).decode() for data in FILES]}
    for form in content["application/json"]["schema"]["oneOf"]:
        if "image" in form["properties"]:
            form["properties"]["image"] = picture
        else:
            form["properties"]["images"]["items"] = picture


@schemathesis.hook
def filter_case(context: object, case: Any) -> bool:
    """Leave out what schemathesis takes for invalid and HTTP does not.

    Headers that nobody knows, which are to be ignored, and empty lists in a form, which leave no trace in it.
    """
    fields = case.body.values() if isinstance(case.body, dict) and case.media_type == "multipart/form-data" else ()
    return all(name.lower() in HEADERS for name in case.headers or {}) and not any(field == [] for field in fields)
