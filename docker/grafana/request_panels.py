"""What becomes of requests: the state in one line, traffic and errors, latency."""

from panel import HERE, IMAGES_A_SECOND, INFERENCE, RATE, Panel, Query, Row, mean, quantile, rate, share

FAILED = 'code=~"5..", code!~"50[13]"'
TURNED_AWAY = 'code="503"'

NOW = (
    Panel(
        title="Ready",
        kind="stat",
        unit="short",
        shows="Whether /health/ready says 200, of the worst instance.",
        bad="no: an instance refuses predictions with 503, or does not even answer Prometheus.",
        do="Read its log and GET /health/ready; see PerceiverNotReady and PerceiverDown in docs/operations.md.",
        # One that is down tells nothing, and would leave the word to the others.
        queries=(Query(f'min(perceiver_ready{{{HERE}}} or up{{job="perceiver", {HERE}}} == 0)', "ready"),),
        width=3,
        words=(("0", "no"), ("1", "yes")),
    ),
    Panel(
        title="Model",
        kind="stat",
        unit="short",
        shows="Name and version of the model that serves, where it runs and in which precision.",
        bad="An older version than the newest in the folder, or cpu on a GPU host.",
        do="GET /models says which versions were refused and why; PERCEIVER_PROVIDER=cuda never serves without a GPU.",
        queries=(
            Query(
                f"max by (name, version, provider, precision) (perceiver_model_info{{{HERE}}})",
                "{{name}} {{version}}, {{provider}} {{precision}}",
            ),
        ),
        width=4,
        names=True,
    ),
    Panel(
        title="Requests",
        kind="stat",
        unit="reqps",
        shows="Requests for inference, answered with whatever status.",
        bad="0 where there should be traffic.",
        do="Ask the load balancer and the clients; a request that was read is counted here whatever becomes of it.",
        queries=(Query(rate("perceiver_requests_total", INFERENCE), "requests"),),
        width=3,
    ),
    Panel(
        title="Images",
        kind="stat",
        unit=IMAGES_A_SECOND,
        shows="Images that the model has classified. Runs for explanations are not counted.",
        bad="Near what benchmarks/engine.py measures on this machine: there is no more to be had.",
        do="Add a GPU or a host, or a model that is cheaper to run.",
        queries=(Query(rate("perceiver_images_total"), "images"),),
        width=3,
    ),
    Panel(
        title="Errors",
        kind="stat",
        unit="percentunit",
        shows="Share of requests for inference that failed: 5xx but 501 and 503, over 5 minutes.",
        bad="Over the objective (red).",
        do="See which reasons stand in 'Error answers by reason'; PerceiverErrorRatioHigh in docs/operations.md.",
        queries=(Query(share(FAILED), "errors"),),
        width=3,
        thresholds=(0.005, 0.01),
    ),
    Panel(
        title="Turned away",
        kind="stat",
        unit="percentunit",
        shows="Share of requests for inference answered 503, which is no error: the service was full, loading "
        "or draining, over 5 minutes.",
        bad="Over the objective (red): users are refused, however well the others are served.",
        do="See which reasons stand in 'Error answers by reason'; PerceiverRejecting in docs/operations.md.",
        queries=(Query(share(TURNED_AWAY), "turned away"),),
        width=3,
        thresholds=(0.025, 0.05),
    ),
    Panel(
        title="p99",
        kind="stat",
        unit="s",
        shows="The time within which 99 of 100 requests for inference were answered, over 5 minutes.",
        bad="Over the objective (red).",
        do="'p99 by stage' says whether decoding, queue or model takes it; PerceiverLatencyHigh in docs/operations.md.",
        queries=(Query(quantile(0.99, "perceiver_request_seconds", window="[5m]"), "p99"),),
        width=3,
        thresholds=(0.125, 0.25),
    ),
    Panel(
        title="Alarms",
        kind="stat",
        unit="short",
        shows="Alarms that are going off now.",
        bad="Any.",
        do="Prometheus' page /alerts names them; each has a section of its name in docs/operations.md.",
        queries=(Query('count(ALERTS{alertstate="firing", alertname=~"Perceiver.*"}) or vector(0)', "alarms"),),
        width=2,
        thresholds=(1, 1),
    ),
)

TRAFFIC = (
    Panel(
        title="Requests by status",
        kind="timeseries",
        unit="reqps",
        shows="Requests for inference by HTTP status.",
        bad="5xx: the service's fault, but for 503, which says that it is full. 4xx and 501: the clients'.",
        do="For 5xx and 4xx see 'Error answers by reason'.",
        queries=(Query(rate("perceiver_requests_total", INFERENCE, by="code"), "{{code}}"),),
        stacked=True,
    ),
    Panel(
        title="Images classified",
        kind="timeseries",
        unit=IMAGES_A_SECOND,
        shows="Images that the model has classified, of which a request may hold several; beside them, those that it "
        "has run for explanations, of which each takes many.",
        bad="A fall while requests stay: images wait or are turned away. A growing share unlike the training images: "
        "clients send something else.",
        do="Compare with queue and rejections. Explanations take only what others leave. Look at what clients send.",
        queries=(
            Query(rate("perceiver_images_total"), "classified"),
            Query(rate("perceiver_explanation_runs_total"), "run for explanations"),
            Query(rate("perceiver_explanations_total"), "explained"),
            Query(rate("perceiver_unfamiliar_images_total"), "unlike the training images"),
        ),
    ),
    Panel(
        title="Errors and rejections",
        kind="timeseries",
        unit="percentunit",
        shows="Shares of requests for inference that failed (5xx but 501 and 503) and that were turned away (503), and "
        "the most that the objectives allow.",
        bad="Above the dashed line of the same kind.",
        do="PerceiverErrorRatioHigh and PerceiverRejecting in docs/operations.md.",
        queries=(
            Query(share(FAILED), "errors"),
            Query(share(TURNED_AWAY), "turned away"),
            Query("perceiver:objective_errors:ratio", "errors allowed"),
            Query("perceiver:objective_rejections:ratio", "turning away allowed"),
        ),
        dashed=("errors allowed", "turning away allowed"),
    ),
    Panel(
        title="Error answers by reason",
        kind="timeseries",
        unit="reqps",
        shows="Requests answered with an error, by its stable code, whatever the route.",
        bad="internal_error, decoding_failed, inference_failed, deadline_exceeded, unavailable, overloaded, "
        "folder_unavailable, not_ready, draining: the service's. All others: a client's.",
        do="docs/operations.md lists every code; the log has a line for each of the first three.",
        queries=(Query(rate("perceiver_rejections_total", by="reason"), "{{reason}}"),),
        stacked=True,
    ),
)

LATENCY = (
    Panel(
        title="Latency of a request",
        kind="timeseries",
        unit="s",
        shows="From the headers of a request for inference to its answer, the client's sending of the body included. "
        "Dots are single requests, with their request id.",
        bad="p99 above the dashed objective. p50 low and p99 high: large images, slow clients, or bursts.",
        do="'p99 by stage' says where the time goes; PerceiverLatencyHigh in docs/operations.md.",
        queries=(
            Query(quantile(0.5, "perceiver_request_seconds"), "p50"),
            Query(quantile(0.9, "perceiver_request_seconds"), "p90"),
            Query(quantile(0.99, "perceiver_request_seconds"), "p99", exemplar=True),
            Query("perceiver:objective_p99:seconds", "objective for p99"),
        ),
        dashed=("objective for p99",),
    ),
    Panel(
        title="p99 by stage",
        kind="timeseries",
        unit="s",
        shows="The slowest hundredth of each stage: decoding of a request, an image's wait, a run of the model.",
        bad="Queue above inference: more comes than the model can do. Decoding above both: large images.",
        do="Queue: add capacity. Decoding: PERCEIVER_DECODE_PROCESSES. Inference: another model or GPU.",
        queries=(
            Query(quantile(0.99, "perceiver_decode_seconds"), "decode"),
            Query(quantile(0.99, "perceiver_queue_seconds"), "queue"),
            Query(quantile(0.99, "perceiver_inference_seconds"), "inference"),
        ),
    ),
    Panel(
        title="Latency, all requests",
        kind="heatmap",
        unit="s",
        shows="How many requests for inference took how long; a row is a bucket of the histogram.",
        bad="A second band above the first: some requests take another way, such as that through decode processes.",
        do="Compare the times at which it appears with the batch sizes and the queue.",
        queries=(Query(f"sum by (le) (increase(perceiver_request_seconds_bucket{{{HERE}}}{RATE}))", "{{le}}"),),
    ),
    Panel(
        title="Mean by stage",
        kind="timeseries",
        unit="s",
        shows="Mean time of decoding a request, of an image's wait, and of a run of the model.",
        bad="Inference that rises at the same batch size: the GPU is shared, throttled, or another version serves.",
        do="Look at the GPU's temperature, at its other users, and at the version's marks.",
        queries=(
            Query(mean("perceiver_decode_seconds"), "decode"),
            Query(mean("perceiver_queue_seconds"), "queue"),
            Query(mean("perceiver_inference_seconds"), "inference"),
        ),
        stacked=True,
    ),
)

REPLICAS = (
    Panel(
        title="Replicas",
        kind="timeseries",
        unit="short",
        shows="Replicas, or workers with a port of their own, that are ready, and all that Prometheus knows of.",
        bad="Fewer than were started: the others have less to spare.",
        do="PerceiverReplicaMissing in docs/operations.md.",
        queries=(
            Query(f"sum(perceiver_ready{{{HERE}}})", "ready"),
            Query("sum(job:perceiver_replicas:known)", "known"),
        ),
        width=8,
        dashed=("known",),
    ),
    Panel(
        title="Requests by replica",
        kind="timeseries",
        unit="reqps",
        shows="Requests for inference that each replica has answered, with whatever status.",
        bad="One that gets much more or much less than the others.",
        do="One that is full or not ready says 503 and is asked again and again: see its log.",
        queries=(Query(rate("perceiver_requests_total", INFERENCE, by="instance"), "{{instance}}"),),
        width=8,
        stacked=True,
    ),
    Panel(
        title="p99 by replica",
        kind="timeseries",
        unit="s",
        shows="The time within which each replica has answered 99 of 100 requests for inference.",
        bad="One far above the others: its host, GPU or neighbours slow it down.",
        do="Choose it as Instance at the top, and go on with 'p99 by stage'.",
        queries=(Query(quantile(0.99, "perceiver_request_seconds", by="instance, le"), "{{instance}}"),),
        width=8,
    ),
)

ROWS = (
    Row("Now", 4, NOW),
    Row("Traffic", 8, TRAFFIC),
    Row("Latency", 8, LATENCY),
    Row("Replicas", 7, REPLICAS),
)
