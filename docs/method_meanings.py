"""What the model store's methods, their parameters and results mean, each with an example call.

The examples are run, in this order, against a real service: tests/integration/test_docs_examples.py. They may use what
those before them made; `model_id` is the model that `put_model` put, `aggregated_id` the one that
`put_aggregated_model` put, `upstream_id` the upstream that `create_upstream_info` made.
"""

from store.conditions import MAX_DEPTH as MAX_CONDITION_DEPTH
from store.conditions import MAX_TERMS
from store.exchange.neighbour import SLOWEST_BYTES_PER_SECOND
from store.local.models import MAX_PAGE_BYTES
from store.new_models import MAX_DEPTH as MAX_META_DEPTH
from store.new_models import MAX_DESCRIPTION_CHARACTERS, MAX_NAME_CHARACTERS, MAX_PARENTS
from store.service.app import MAX_TRANSFERS
from store.service.forms import MAX_FIELD_BYTES, MAX_PARTS
from store.service.rpc import MAX_ANSWER_BYTES, MAX_BATCH, MAX_BODY_BYTES, MAX_NESTING

METHODS = {
    "The service and its model stores": (
        "get_server_version",
        "initialize_model_store",
        "exists_store",
        "get_stores",
    ),
    "Put and load models": ("put_model", "put_aggregated_model", "load_model"),
    "Find models": (
        "get_model_info",
        "exists_model",
        "get_models",
        "get_model_info_latest",
        "get_latest_aggregated_model",
        "get_lineage",
    ),
    "Upstreams": (
        "create_upstream_info",
        "list_upstream_info",
        "get_upstream_info",
        "update_upstream_info",
    ),
    "Up and down the hierarchy": (
        "feedback",
        "get_latest_feedbacked_models",
        "proxy_request_transfer_info",
        "request_transfer",
        "get_latest_transferred_model",
    ),
    "Parties": ("create_party", "get_parties", "delete_party"),
    "Delete": ("delete_upstream_info", "delete_model", "delete_all_model", "delete_store"),
}

_PARAMETERS = {
    "model_store_ddc": "The model store.",
    "model_id": "The model.",
    "raise_if_no_exists": "Whether it is an error (-32001) if there is none; otherwise the result is 0.",
    "file": "The file's path, or an open binary file.",
    "model_kind": "What kind of model it is, in a word of yours.",
    "model_description": "A sentence for people.",
    "model_meta": "Whatever is to be kept with it: an object of JSON.",
    "model_state": "Its [state](#states).",
    "round": "The round, as its maker counts.",
    "parents": "Ids of the models it was made from.",
    "metrics": "Measured values by name.",
    "num_examples": "How many examples it was trained on.",
    "conds": "Which models: see [conditions](#conditions).",
    "offset": "Leave out so many of the first.",
    "limit": "At most so many; none: all.",
    "order": "A field, or several, `-` before one for the other direction; the order of arrival breaks ties.",
    "upstream": "The upstream's alias or id; see [upstreams](#which-upstream).",
    "upstream_endpoint": "The service's URL: `http://HOST:PORT` or `https://HOST`.",
    "upstream_apikey": "The API key there.",
    "upstream_secret": "The secret there; kept encrypted, never shown again.",
    "upstream_model_store_ddc": "The model store there; empty: of the same name.",
    "alias": "What the upstream is called here; each of a model store's has its own.",
    "enabled": "Whether it is used.",
    "description": "A sentence for people.",
    "id": "Its id.",
    "here": "Those that have registered at this node itself.",
}
EDGE = {
    "url": "The edge's HTTP service.",
    "api_key": "An operator's API key there; needed unless its access is open.",
    "secret": "The secret that belongs to it.",
    "rounds": "Training rounds at the edge within one of the centre's.",
    "trainer": "The trainer's name at the edge's sites, if it is another one there.",
    "min_sites": "The edge's quorum. Without it: more than half of its sites.",
    "strategy": "How the edge joins its sites' updates; the table [strategy] of a job file.",
    "timeout_seconds": "How long the service may go without a byte, in seconds.",
    "patience_seconds": "How long the service may be away before a part fails, in seconds.",
}
_OWN_PARAMETERS = {  # of a method, where the words above do not do
    ("initialize_model_store", "model_store_ddc"): "The name: `ddc:` and 1 to 100 letters, digits, dots, underscores, "
    "spaces and hyphens, the first a letter or digit.",
    ("get_latest_feedbacked_models", "round"): "Only models of this round; none: of the newest round that has any.",
    ("get_model_info_latest", "round"): "Only models of this round.",
    ("get_model_info_latest", "model_kind"): "Only models of this kind.",
    ("get_latest_aggregated_model", "round"): "Only models of this round.",
    ("get_latest_aggregated_model", "model_kind"): "Only models of this kind.",
    ("get_latest_transferred_model", "round"): "Only models of this round.",
    ("get_latest_transferred_model", "model_kind"): "Only models of this kind.",
    ("list_upstream_info", "model_store_ddc"): "Only the upstreams of this model store.",
    ("proxy_request_transfer_info", "model_store_ddc"): "The model store; where there is no upstream, it answers.",
}

RESULTS = {  # method -> what it returns, and what that means where it needs saying
    "get_server_version": ("text", "the service's version"),
    "initialize_model_store": ("ddc_info", ""),
    "exists_store": ("true or false", ""),
    "get_stores": ("list of ddc_info", "those that the caller may read"),
    "put_model": ("model_info", ""),
    "put_aggregated_model": ("model_info", ""),
    "load_model": ("blocks of bytes", "the file"),
    "get_model_info": ("model_info", "with `tensors`, if it holds any"),
    "exists_model": ("true or false", ""),
    "get_models": ("list of model_info", ""),
    "get_model_info_latest": ("model_info", "the one that came last, or error -32001 if there is none"),
    "get_latest_aggregated_model": ("model_info", "or error -32001 if there is none"),
    "get_lineage": ("list of lineage rows", "the model first, each model once"),
    "create_upstream_info": ("upstream_info", ""),
    "list_upstream_info": ("list of upstream_info", ""),
    "get_upstream_info": ("upstream_info", ""),
    "update_upstream_info": ("upstream_info", ""),
    "feedback": ("model_info", "the upstream's own, with another `model_id`"),
    "get_latest_feedbacked_models": ("list of model_info", "of each maker the newest"),
    "proxy_request_transfer_info": ("model_info", "the upstream's"),
    "request_transfer": ("model_info", "of the copy here"),
    "get_latest_transferred_model": ("model_info", "or error -32001 if there is none"),
    "create_party": ("party_info", ""),
    "get_parties": ("list of party_info", ""),
    "delete_party": ("number", "how many were deleted"),
    "delete_upstream_info": ("number", "how many were deleted"),
    "delete_model": ("number", "1, or 0 if there was none and that is no error"),
    "delete_all_model": ("number", "how many were deleted"),
    "delete_store": ("number", "1, or 0 if there was none and that is no error"),
}

EXAMPLES = {
    "get_server_version": "result = api.get_server_version()",
    "initialize_model_store": 'result = api.initialize_model_store("ddc:my_first_model_store")',
    "exists_store": 'result = api.exists_store("ddc:my_first_model_store")',
    "get_stores": "result = api.get_stores()",
    "put_model": """\
# To pass a file path
result = api.put_model(
    "ddc:my_first_model_store",
    "./my_models/model_1",
    model_description="test model",
    model_meta={"additional": "additional data"},
)
model_id = result["model_id"]

# When passing a file object
with open("./my_models/model_1", "rb") as f:
    result = api.put_model(
        "ddc:my_first_model_store",
        f,
        model_description="test model",
        model_meta={"additional": "additional data"},
    )""",
    "put_aggregated_model": """\
# To pass a file path
result = api.put_aggregated_model(
    "ddc:my_first_model_store",
    "./my_models/aggregated_model_1",
    model_description="test model",
    model_meta={"additional": "additional data"},
    round=1,
    parents=[model_id],
)
aggregated_id = result["model_id"]""",
    "load_model": """\
_result = api.load_model("ddc:my_first_model_store", model_id)
result = b"".join(_result)""",
    "get_model_info": 'result = api.get_model_info("ddc:my_first_model_store", model_id)',
    "exists_model": 'result = api.exists_model("ddc:my_first_model_store", model_id)',
    "get_models": """\
result = api.get_models("ddc:my_first_model_store")

# The ten newest that were only put, of two rounds
result = api.get_models(
    "ddc:my_first_model_store",
    conds={"and": [{"=": ["model_state", 10]}, {"in": ["round", [0, 1]]}]},
    order="-created_at",
    limit=10,
)""",
    "get_model_info_latest": 'result = api.get_model_info_latest("ddc:my_first_model_store")',
    "get_latest_aggregated_model": 'result = api.get_latest_aggregated_model("ddc:my_first_model_store")',
    "get_lineage": 'result = api.get_lineage("ddc:my_first_model_store", aggregated_id)',
    "create_upstream_info": """\
result = api.create_upstream_info(
    "ddc:my_first_model_store",
    "http://127.0.0.1:8791",
    upstream_model_store_ddc="ddc:all_models",
    alias="centre",
)
upstream_id = result["id"]""",
    "list_upstream_info": 'result = api.list_upstream_info("ddc:my_first_model_store")',
    "get_upstream_info": "result = api.get_upstream_info(upstream_id)",
    "update_upstream_info": 'result = api.update_upstream_info(upstream_id, description="the centre")',
    "feedback": 'result = api.feedback("ddc:my_first_model_store", model_id)',
    "get_latest_feedbacked_models": """\
centre = Api("http://127.0.0.1:8791")
result = centre.get_latest_feedbacked_models("ddc:all_models")""",
    "proxy_request_transfer_info": 'result = api.proxy_request_transfer_info("ddc:my_first_model_store")',
    "request_transfer": 'result = api.request_transfer("ddc:my_first_model_store")',
    "get_latest_transferred_model": 'result = api.get_latest_transferred_model("ddc:my_first_model_store")',
    "create_party": """\
result = api.create_party("my experiment 1")
party_id = result["id"]""",
    "get_parties": "result = api.get_parties()",
    "delete_party": "result = api.delete_party(party_id)",
    "delete_upstream_info": "result = api.delete_upstream_info(upstream_id)",
    "delete_model": 'result = api.delete_model("ddc:my_first_model_store", model_id)',
    "delete_all_model": 'result = api.delete_all_model("ddc:my_first_model_store")',
    "delete_store": 'result = api.delete_store("ddc:my_first_model_store")',
}

DOCUMENTS: dict[str, dict[str, tuple[str, str]]] = {
    "model_info": {
        "model_id": ("text", "The model's id, a UUID."),
        "tenant_id": ("text", "Who put or made it; kept when it is fed back."),
        "model_store_ddc": ("text", "The model store."),
        "model_kind": (
            "text",
            "What kind of model; a job's are `initial`, `update`, `global`, `moments` and `optimizer`.",
        ),
        "model_description": ("text", "A sentence for people."),
        "model_meta": ("object", "What its maker keeps with it."),
        "model_state": ("number", "Its [state](#states)."),
        "model_hash": (
            "text",
            "BLAKE3, in hexadecimal: of the file that was put, or of the index of a model that a job made.",
        ),
        "model_size": ("number", "Bytes of the file, or of all shards."),
        "round": ("number", "The round that made it; 0 for none."),
        "hop_count": ("number", "How many nodes it has come through since its maker."),
        "start_datetime": ("datetime or null", "When its making began."),
        "end_datetime": ("datetime or null", "When its making ended."),
        "location": ("[x, y], text or null", "Where its maker is; text is WKB in hexadecimal."),
        "parents": ("list of text", "Ids of the models it was made from."),
        "job_id": ("text or null", "The job that made it."),
        "site": ("text or null", "The site that made it; null for a coordinator."),
        "num_examples": ("number or null", "How many examples it was trained on."),
        "metrics": ("object", "Measured values by name."),
        "shards": ("list of {digest, size}", "The blobs that hold it, in order."),
        "index_hash": ("text or null", "BLAKE3 of the list of its tensors; null for a file without tensors."),
        "origin": ("{node_id, model_id} or null", "Of which model at which node it is a copy."),
        "created_at": ("datetime", "When it came here."),
        "kept": ("true or false", "Whether a person has said that its bytes stay (`fedchord models keep`)."),
        "expired_at": ("datetime or null", "Since when its bytes may be removed; null: they stay."),
        "expired_reason": ("text", "Why they may be removed, else empty."),
    },
    "ddc_info": {
        "id": ("text", "The model store's id, a UUID."),
        "model_store_ddc": ("text", "Its name."),
        "tenant_id": ("text", "Whose it is; empty for the operator's."),
        "description": ("text", "A sentence for people."),
        "created_at": ("datetime", "When it was created."),
        "updated_at": ("datetime", "When it was last changed."),
    },
    "upstream_info": {
        "id": ("text", "The upstream's id, a UUID."),
        "model_store_ddc": ("text", "The model store that feeds it."),
        "upstream_endpoint": ("text", "The service's URL."),
        "upstream_apikey": ("text", "The API key there. The secret is never shown."),
        "upstream_model_store_ddc": ("text", "The model store there."),
        "alias": ("text", "What it is called here."),
        "description": ("text", "A sentence for people."),
        "enabled": ("true or false", "Whether it is used."),
        "created_at": ("datetime", "When it was added."),
        "updated_at": ("datetime", "When it was last changed."),
    },
    "party_info": {
        "id": ("text", "The party's id, a UUID."),
        "tenant_id": ("text", "Its organisation: the node's setting `tenant_id`."),
        "tenant_name": ("text", "The organisation's name: the node's setting `tenant_name`."),
        "description": ("text", "A sentence for people."),
        "hop_count": ("number", "How many nodes up from the party this one is."),
        "created_at": ("datetime", "When it registered."),
        "updated_at": ("datetime", "When it last registered."),
    },
}

STATES = {
    "CREATED": "put by `put_model`, or built by a job.",
    "FEEDBACKED": "sent up: fed back by a node below, or a site's update in a job.",
    "AGGREGATED": "made from others: put by `put_aggregated_model`, or by a job's round.",
    "TRANSFERRED": "a copy of what the upstream aggregated.",
}

JSONRPC_ERRORS = (
    (-32700, 400, "The body is not JSON."),
    (-32600, 400, "It is not a JSON-RPC 2.0 request."),
    (-32601, 404, "There is no such method."),
    (-32603, 500, "The service failed; its log has the reason."),
)

LIMITS = (
    ("A request at /jsonrpc.", f"{MAX_BODY_BYTES >> 20} MiB"),
    ("Requests in a batch.", str(MAX_BATCH)),
    ("How deep a request may nest.", f"{MAX_NESTING} levels"),
    ("Parts of an upload's form.", str(MAX_PARTS)),
    ("All fields of an upload's form together, besides model_meta and metrics.", f"{MAX_FIELD_BYTES >> 20} MiB"),
    ("How deep model_meta and metrics may nest.", f"{MAX_META_DEPTH} levels"),
    ("model_kind.", f"{MAX_NAME_CHARACTERS} characters"),
    ("model_description.", f"{MAX_DESCRIPTION_CHARACTERS:,} characters"),
    ("parents.", f"{MAX_PARENTS:,} ids"),
    ("How deep conditions may nest.", f"{MAX_CONDITION_DEPTH} levels"),
    ("Transfers at once; the others wait in line.", str(MAX_TRANSFERS)),
    ("The records that get_models returns at once.", f"{MAX_PAGE_BYTES >> 20} MiB"),
    ("The answers of a batch; later requests are refused.", f"{MAX_ANSWER_BYTES >> 20} MiB"),
    ("How fast an upstream's blob must come, in the mean.", f"{SLOWEST_BYTES_PER_SECOND // 1000} kB a second"),
    ("Terms of conditions, values of `in` included.", str(MAX_TERMS)),
)


def parameter(method: str, name: str) -> str:
    """Return what the method's parameter means."""
    return _OWN_PARAMETERS.get((method, name)) or _PARAMETERS[name]


def known_parameters() -> set[str | tuple[str, str]]:
    """Return every name that has a meaning here, with its method where it is the method's own."""
    return {*_PARAMETERS, *_OWN_PARAMETERS}
