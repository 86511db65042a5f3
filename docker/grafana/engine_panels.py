"""What is behind the requests: batches and queue, model versions, the process, the GPU."""

from panel import HERE, IMAGES, RATE, Panel, Query, Row, mean, rate

BATCHES = (
    Panel(
        title="Batch size",
        kind="heatmap",
        unit=IMAGES,
        shows="How many runs of the model had how many images; a row is a bucket of the histogram.",
        bad="All at PERCEIVER_MAX_BATCH_SIZE: the model is the limit. All at 1 is good: nobody waits for others.",
        do="At the limit: a larger PERCEIVER_MAX_BATCH_SIZE if the GPU's memory allows it, else more GPUs.",
        queries=(Query(f"sum by (le) (increase(perceiver_batch_size_bucket{{{HERE}}}{RATE}))", "{{le}}"),),
    ),
    Panel(
        title="Mean batch size",
        kind="timeseries",
        unit=IMAGES,
        shows="Images in a run of the model, on average.",
        bad="No value is bad by itself: it grows with the load, up to the dashed limit. It falls when memory runs out.",
        do="If it stays small while the queue is long, look for failing runs. Limit: PERCEIVER_MAX_BATCH_SIZE, or less "
        "where a CPU was measured to be faster so.",
        queries=(
            Query(mean("perceiver_batch_size"), "mean"),
            Query(f"max(perceiver_max_batch_size{{{HERE}}})", "limit"),
        ),
        dashed=("limit",),
    ),
    Panel(
        title="Queue",
        kind="timeseries",
        unit=IMAGES,
        shows="Images that wait for a batch, images accepted and not yet answered, those of them for explanations, and "
        "how many may be accepted.",
        bad="Accepted at the dashed limit: requests are turned away with 503.",
        do="Add capacity. A longer queue (PERCEIVER_MAX_QUEUE_SIZE) only makes everyone wait longer.",
        queries=(
            Query(f"sum(perceiver_queue_length{{{HERE}}})", "waiting"),
            Query(f"sum(perceiver_admitted_images{{{HERE}}})", "accepted"),
            Query(f"sum(perceiver_admitted_background_images{{{HERE}}})", "for explanations"),
            Query(f"sum(perceiver_max_queue_size{{{HERE}}})", "limit"),
        ),
        dashed=("limit",),
    ),
    Panel(
        title="Bodies in memory",
        kind="timeseries",
        unit="bytes",
        shows="Bytes of the request bodies that are held.",
        bad="Near PERCEIVER_MAX_QUEUE_BYTES: requests are turned away with 503, however short the queue.",
        do="Look for clients that send large images or many a request; the limits are in docs/operations.md.",
        queries=(Query(f"sum(perceiver_admitted_bytes{{{HERE}}})", "bodies"),),
    ),
    Panel(
        title="Dropped and failed",
        kind="timeseries",
        unit="cps",
        shows="A second: images not run because their deadline had passed or their client had left, and failed runs.",
        bad="Deadlines: the queue is longer than clients wait. Clients that leave: the same, from their side. Failed "
        "runs: GPU or model.",
        do="PerceiverQueueSaturated and PerceiverBatchesFailing in docs/operations.md.",
        queries=(
            Query(rate("perceiver_deadline_misses_total"), "deadline passed"),
            Query(rate("perceiver_cancellations_total"), "client left"),
            Query(rate("perceiver_failed_batches_total"), "failed run"),
            Query(rate("perceiver_decode_process_ends_total"), "decode process ended"),
        ),
    ),
    Panel(
        title="Fullness of the queue",
        kind="timeseries",
        unit="percentunit",
        shows="Accepted images as a share of what is accepted at most, for each instance.",
        bad="Above 80 % for minutes.",
        do="PerceiverQueueSaturated in docs/operations.md.",
        queries=(Query(f"instance:perceiver_queue:saturation{{{HERE}}}", "{{instance}}"),),
        thresholds=(0.5, 0.8),
    ),
)

VERSIONS = (
    Panel(
        title="Version that serves",
        kind="state-timeline",
        unit="short",
        shows="Which model served when. Changes are also marked in all other panels.",
        bad="A gap: no model was live. Many changes: somebody exports again and again.",
        do="GET /models; to stay with a version, set PERCEIVER_MODEL_VERSION.",
        queries=(
            Query(
                f"max by (name, version, provider, precision) (perceiver_model_info{{{HERE}}})",
                "{{name}} {{version}}, {{provider}} {{precision}}",
            ),
        ),
        width=10,
        words=(("1", "live"),),
    ),
    Panel(
        title="Loaded and refused",
        kind="timeseries",
        unit="short",
        shows="Model versions that were made live, and versions that failed a check, since the process started.",
        bad="A step of refused: the newest version does not serve.",
        do="GET /models says why; PerceiverReloadRefused in docs/operations.md.",
        queries=(Query(f"sum by (result) (perceiver_model_reloads_total{{{HERE}}})", "{{result}}"),),
        width=7,
    ),
    Panel(
        title="Difference on the golden images",
        kind="timeseries",
        unit="sci",
        shows="Largest difference between a logit here and in torch, when a version was last checked.",
        bad="Near the version's golden_tolerance (GET /models): provider or precision compute something else.",
        do="python -m export --verify FOLDER on this machine; above the tolerance the version is refused by itself.",
        queries=(Query(f"perceiver_golden_max_abs_difference{{{HERE}}}", "{{instance}}"),),
        width=7,
    ),
)

PROCESS = (
    Panel(
        title="Memory",
        kind="timeseries",
        unit="bytes",
        shows="Resident memory of each worker, without its decode processes.",
        bad="Growth without end, or near the container's limit (SERVICE_MEMORY), at which it is killed.",
        do="It grows with PERCEIVER_MAX_QUEUE_BYTES; PERCEIVER_DECODE_PROCESSES times large images come on top.",
        queries=(Query(f'process_resident_memory_bytes{{job="perceiver", {HERE}}}', "{{instance}}"),),
        width=6,
    ),
    Panel(
        title="CPU",
        kind="timeseries",
        unit="suffix: cores",
        shows="Processor cores that each process keeps busy.",
        bad="On a GPU host, near 1 and latency up: the event loop is the limit.",
        do="Raise PERCEIVER_WORKERS, with PERCEIVER_MANAGEMENT_PORT, or start another replica. On a CPU host all cores "
        "are used on purpose.",
        queries=(Query(f'rate(process_cpu_seconds_total{{job="perceiver", {HERE}}}{RATE})', "{{instance}}"),),
        width=6,
    ),
    Panel(
        title="Open files",
        kind="timeseries",
        unit="short",
        shows="Open files and connections, and how many may be open.",
        bad="Near the limit: connections are refused.",
        do="Lower PERCEIVER_MAX_CONNECTIONS or raise the container's limit of open files.",
        queries=(
            Query(f'process_open_fds{{job="perceiver", {HERE}}}', "open, {{instance}}"),
            Query(f'process_max_fds{{job="perceiver", {HERE}}}', "limit, {{instance}}"),
        ),
        width=6,
    ),
    Panel(
        title="Since the start",
        kind="timeseries",
        unit="dtdurations",
        shows="How long the process has run.",
        bad="A saw: it ends again and again.",
        do="The log's last lines before each start say why; PerceiverRestarting in docs/operations.md.",
        queries=(Query(f'time() - process_start_time_seconds{{job="perceiver", {HERE}}}', "{{instance}}"),),
        width=6,
    ),
)

GPU = (
    Panel(
        title="GPU memory",
        kind="timeseries",
        unit="bytes",
        shows="Memory in use on each GPU by all processes, and what there is.",
        bad="Above 95 %: a larger batch or a new version may not find room.",
        do="PERCEIVER_GPU_MEMORY_LIMIT_BYTES, a smaller PERCEIVER_MAX_BATCH_SIZE; nvidia-smi says who else is there.",
        queries=(
            Query(f"perceiver_gpu_memory_used_bytes{{{HERE}}}", "used, GPU {{gpu}}"),
            Query(f"perceiver_gpu_memory_total_bytes{{{HERE}}}", "there is, GPU {{gpu}}"),
        ),
        width=6,
        needs_gpu=True,
    ),
    Panel(
        title="GPU busy",
        kind="timeseries",
        unit="percentunit",
        shows="Share of time in which a kernel ran.",
        bad="100 % with a long queue: the GPU is the limit. Low with a long queue: the host's processor is.",
        do="Compare with 'CPU' and 'Mean batch size'.",
        queries=(Query(f"perceiver_gpu_utilization_ratio{{{HERE}}}", "GPU {{gpu}}"),),
        width=6,
        needs_gpu=True,
    ),
    Panel(
        title="GPU temperature",
        kind="timeseries",
        unit="celsius",
        shows="Temperature of each GPU, from NVIDIA's exporter (profile gpu).",
        bad="Where the GPU slows itself down: 83 to 90 degrees, by model.",
        do="Cooling; nvidia-smi -q -d PERFORMANCE says whether it is throttled.",
        queries=(Query("DCGM_FI_DEV_GPU_TEMP", "GPU {{gpu}}"),),
        width=6,
        needs_gpu=True,
    ),
    Panel(
        title="GPU power",
        kind="timeseries",
        unit="watt",
        shows="Power that each GPU draws, from NVIDIA's exporter (profile gpu).",
        bad="At the GPU's limit all the time: it is throttled by power.",
        do="nvidia-smi -q -d POWER shows the limit.",
        queries=(Query("DCGM_FI_DEV_POWER_USAGE", "GPU {{gpu}}"),),
        width=6,
        needs_gpu=True,
    ),
)

ROWS = (
    Row("Batches and queue", 8, BATCHES),
    Row("Model", 7, VERSIONS),
    Row("Process", 7, PROCESS),
    Row("GPU", 7, GPU),
)
