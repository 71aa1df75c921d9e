"""Why a step failed, told from outputs of real runs (tests/data/failures) and from what may stand around them."""

import re
import string
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfsvc.llamafactory import failures, known_failures
from lfsvc.llamafactory.failures import cause, explain

DATA = Path(__file__).parent.parent / "data" / "failures"


def origins() -> dict[str, tuple[Path, int]]:
    """Every output that the tables name: its file and the step's exit status."""
    found = {}
    for kind in ("recorded", "quoted"):
        for line in (DATA / f"{kind}.tsv").read_text().splitlines():
            name, status, origin = line.split("\t")
            assert origin, name
            found[name] = (DATA / kind / f"{name}.log", int(status))
    return found


ORIGINS = origins()

# What the user must be told: of the cause, and of what to do.
EXPECTED = {
    # recorded
    "bad_yaml": ("YAML cannot be read (line 21", "indentation"),
    "benchmark_save_dir": ("save_dir already exists",),
    "benchmark_without_data": ("no folder /srv/lab/evaluation/mmlu", "task_dir"),
    "broken_json": ("not valid JSON (Column() changed from object to array in row 0)",),
    "disk_full": ("disk is full", "save_total_limit"),
    "disk_full_optimizer": ("disk is full", "save_total_limit"),
    "export_cut_adapter": ("weights is damaged or incomplete", "git-lfs"),
    "export_no_adapter": ("no adapter in /srv/lab/saves/gone", "adapter_name_or_path"),
    "export_oft": ("AssertionError: Invalid fine-tuning method.",),
    "export_other_base": ("q_proj.lora_A.default.weight is [4, 64] here and [4, 32] there", "base model"),
    "export_quantised": ("RuntimeError: No GPU or XPU found.",),
    "export_unknown_key": ("does not know the key 'learning_rate'",),
    "interrupted": ("interrupted from outside (SIGINT)", "submit it again"),
    "killed_bare": ("it was killed (SIGKILL)", "journalctl -k"),
    "layerwise_galore": ("layer-wise GaLore does not work under torchrun", "--env FORCE_TORCHRUN=0"),
    "lora_target": ("no module 'query_proj'", "lora_target: all"),
    "memory": ("machine's memory", "15360000000 bytes"),
    "model_cut_short": ("weights is damaged or incomplete",),
    "model_without_config": ("/srv/lab/models/no_weights is not a whole model",),
    "no_bitsandbytes": ("Python package bitsandbytes", "pip install bitsandbytes"),
    "no_data_file": ("/srv/lab/data/gone/gone.json is not there", "file_name"),
    "no_data_folder": ("/srv/lab/data/none/dataset_info.json cannot be opened", "dataset_dir"),
    "no_deepspeed": ("Python package deepspeed", "pip install deepspeed"),
    "no_eval_data": ("no data for it", "eval_dataset"),
    "no_eval_data_at_end": ("no data for it", "val_size"),
    "no_model_folder": ("no folder /srv/lab/modle", "model_name_or_path"),
    "no_model_offline": ("hub cannot be reached", "HF_HUB_OFFLINE"),
    "no_processes": ("no device is visible", "NPROC_PER_NODE=1"),
    "no_rouge": ("Python package", "pip install"),
    "no_torchrun": ("torchrun is not on the job's PATH", "lfsvc setup"),
    "not_a_number": ("number in the YAML was read as text",),
    "not_utf8": ("encoding", "PYTHONUTF8=1"),
    "output_dir_not_empty": ("output_dir holds the results of an earlier training", "overwrite_output_dir: true"),
    "port_taken": ("port 29517 is in use", "MASTER_PORT"),
    "rank_1_fails_late": ("limit of open files",),
    "rank_1_short_of_memory": ("machine's memory", "2048000000 bytes"),
    "rank_killed": ("was killed (SIGKILL)", "journalctl -k"),
    "resume_from_nowhere": ("no checkpoint in /srv/lab/saves/gone",),
    "terminated": ("ended from outside (signal 15)",),
    "text_as_number": ("number in the YAML was read as text", "1.0e-4"),
    "unknown_dataset": ("no data set summs in dataset_info.json", "`dataset`"),
    "unknown_dataset_bare": ("no data set summs in dataset_info.json",),
    "unknown_dataset_two": ("no data set summs in dataset_info.json",),
    "unknown_key": ("does not know the key 'lora_rnak'",),
    "unknown_template": ("no template lama3", "`template`"),
    "wrong_columns": ("no instruction", "`columns`"),
    # quoted
    "checkpoint_not_unpickled": ("cannot be unpickled", "resume_from_checkpoint"),
    "cuda_driver_too_old": ("torch cannot use the GPU", "driver"),
    "cuda_illegal_access": ("an illegal memory access", "Run it again"),
    "cuda_device_assert": ("index was out of range on the GPU", "CUDA_LAUNCH_BLOCKING=1"),
    "cuda_invalid_ordinal": ("device was asked for that is not there", "NPROC_PER_NODE"),
    "cuda_no_kernel": ("no code for this GPU",),
    "cuda_out_of_memory": ("device ran out of memory (CUDA, at an allocation of 270.00 MiB)", "cutoff_len"),
    "dataloader_bus_error": ("shared memory", "dataloader_num_workers"),
    "deepspeed_without_torchrun": ("DeepSpeed needs torchrun", "FORCE_TORCHRUN"),
    "disk_quota": ("quota",),
    "fp16_gradients": ("fp16", "bf16"),
    "gloo_timeout": ("waited for the others", "ddp_timeout"),
    "image_tokens": ("media than placeholders", "cutoff_len"),
    "map_worker_died": ("worker process was killed", "preprocessing_num_workers"),
    "no_cuda_home": ("CUDA extension cannot be built", "CUDA_HOME"),
    "no_valid_samples": ("none of its samples can be used", "dataset_info.json"),
    "several_devices_no_torchrun": ("several devices are visible", "FORCE_TORCHRUN"),
    "unknown_model": ("no model llama/Llama-2-7b-chat", "model_name_or_path"),
    "eval_removed": ("removed in LLaMA-Factory 0.9.4", "do_eval"),
    "gated_model": ("gated", "HF_TOKEN"),
    "hccl_ei0002_ray": ("HCCL, EI0002", "HCCL_EXEC_TIMEOUT"),
    "hccl_ei0006": ("HCCL, EI0006", "HCCL_CONNECT_TIMEOUT"),
    "hccl_ei0006_alone": ("HCCL, EI0006",),
    "hccl_ej0001": ("earlier training still holds the NPU", "ten seconds"),
    "hccl_ej0003": ("HCCL port", "HCCL_IF_BASE_PORT"),
    "model_too_new": ("llava_qwen", "Update transformers"),
    "nccl_duplicate_gpu": ("the same GPU",),
    "nccl_remote_exited": ("another rank was lost",),
    "nccl_shared_memory": ("shared memory", "/dev/shm"),
    "nccl_system_error": ("NCCL met a system error", "NCCL_DEBUG=INFO"),
    "nccl_watchdog": ("NCCL, _REDUCE_SCATTER_BASE", "ddp_timeout"),
    "nccl_watchdog_after_bar": ("NCCL, ALLREDUCE", "ddp_timeout"),
    "no_bf16": ("bf16", "fp16"),
    "no_eval_data_new": ("no data for it", "eval_dataset"),
    "npu_el0003": ("EL0003: The argument is invalid",),
    "npu_el0004": ("device ran out of memory", "cutoff_len"),
    "npu_out_of_memory": ("device ran out of memory (NPU, at an allocation of 22.00 MiB)",),
    "npu_out_of_memory_2": ("device ran out of memory (NPU, at an allocation of 72.00 MiB)",),
    "port_taken_old_torch": ("port 29500 is in use",),
    "quantised_base": ("quantised model", "unquantised base"),
    "rank_crashed": ("SIGSEGV",),
    "rank_killed_old_torch": ("rank 0 was killed (SIGKILL)", "journalctl -k"),
    "semaphore_no_space": ("shared memory", "/dev/shm"),
    "stream_writer": ("disk is full",),
    "torch_too_old": ("2.6",),
    "val_size_too_small": ("too small for val_size",),
    "wandb_login": ("asked a question", "report_to: none"),
}  # fmt: skip


def test_every_output_has_an_origin_and_an_expectation() -> None:
    stored = {path.stem for path in DATA.glob("*/*.log")}
    assert stored == set(ORIGINS)
    assert stored == set(EXPECTED)


def is_readable(text: str) -> None:
    """It reads well after "The train step failed: " and before another sentence."""
    assert text.endswith(".")
    assert "\n" not in text
    assert "{" not in text, "a field that was not filled in"
    assert "  " not in text and " ." not in text and "()" not in text.replace("Column()", "")
    assert len(text) < 2 * failures.MOST_SHOWN
    for wrapper in known_failures.WRAPPERS:
        assert wrapper not in text


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_cause_and_what_to_do_are_told(name: str) -> None:
    path, status = ORIGINS[name]
    text = explain(str(path), status)
    for fragment in EXPECTED[name]:
        assert fragment in text, text
    is_readable(text)


def test_every_row_of_the_table_fills_in_its_sentences() -> None:
    for pattern, why, what_to_do in known_failures.KNOWN:
        groups = set(re.compile(pattern, re.MULTILINE).groupindex) | {"install"}
        used = {field for text in (why, what_to_do) for _, field, _, _ in string.Formatter().parse(text) if field}
        assert used <= groups, pattern
        assert not why.endswith("."), why
        assert what_to_do.endswith("."), what_to_do


# ---- What stands around a cause ----

TRACEBACK = ["Traceback (most recent call last):", '  File "/opt/x.py", line 3, in main', "    work()"]
WRAPPED = [
    *TRACEBACK,
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    "============================================================",
    "launcher.py FAILED",
]


def of_rank(rank: int, lines: list[str]) -> list[str]:
    return [f"[rank{rank}]: {line}" for line in lines]


def root_cause(rank: int, code: int) -> list[str]:
    return [
        "Root Cause (first observed failure):",
        "[0]:",
        f"  rank      : {rank} (local_rank: {rank})",
        f"  exitcode  : {code} (pid: 77) ",
    ]


def test_what_a_training_survived_is_not_its_cause() -> None:
    survived = [*TRACEBACK, "OSError: [Errno 28] No space left on device", "going on without a cache"]
    assert "ValueError: odd." in cause([*survived, "step 1", *TRACEBACK, "ValueError: odd"])
    assert "killed" in cause([*survived, *WRAPPED, *root_cause(0, -9)])
    assert "killed" in cause(survived, 137)


def test_a_rank_that_crashed_is_not_explained_by_what_others_said() -> None:
    lines = [*of_rank(1, [*TRACEBACK, "ValueError: survived"]), *WRAPPED, *root_cause(0, -11)]
    assert "SIGSEGV" in cause(lines)
    lines = [*of_rank(0, [*TRACEBACK, "ValueError: and then the teardown crashed"]), *WRAPPED, *root_cause(0, -11)]
    assert "ValueError: and then" in cause(lines)


def test_words_in_data_and_logs_are_not_believed() -> None:
    said = ["No space left on device", "user: RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB", "EJ0001"]
    assert cause(said) == ""
    assert cause([*said, *TRACEBACK, "ValueError: odd"]) == "ValueError: odd."


def test_an_unknown_exception_speaks_for_itself() -> None:
    assert cause([*TRACEBACK, "acme.errors.OddError: it is odd."]) == "OddError: it is odd."
    assert cause([*TRACEBACK, "AssertionError"]) == "AssertionError."
    long = cause([*TRACEBACK, "ValueError: " + "odd " * 1000])
    assert len(long) < failures.MOST_SHOWN + 10


def test_launchers_never_speak() -> None:
    assert cause(WRAPPED) == ""
    assert cause([*TRACEBACK, "subprocess.CalledProcessError: Command '['torchrun']' returned non-zero"]) == ""


def test_the_rank_that_failed_first_speaks() -> None:
    lines = [
        *of_rank(0, [*TRACEBACK, "ValueError: late"]),
        *of_rank(1, [*TRACEBACK, "ValueError: early"]),
        *WRAPPED,
        *root_cause(1, 1),
    ]
    assert cause(lines) == "ValueError: early."
    assert cause(lines[:8]) == "ValueError: late."
    assert cause([*lines[:4], *TRACEBACK, "x.SignalException: Process 7 got signal: 15"]) == "ValueError: late."


def test_interleaved_ranks_are_told_apart() -> None:
    pairs = zip(of_rank(0, [*TRACEBACK, "ValueError: zero"]), of_rank(1, [*TRACEBACK, "ValueError: one"]), strict=True)
    lines = [line for pair in pairs for line in pair]
    assert cause([*lines, *WRAPPED, *root_cause(1, 1)]) == "ValueError: one."


def test_a_broken_connection_yields_to_its_cause() -> None:
    broken = of_rank(
        0, [*TRACEBACK, "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:5"]
    )
    other = of_rank(1, [*TRACEBACK, "KeyError: 'odd'"])
    assert cause([*broken, *other]) == "KeyError: 'odd'."
    assert cause([*broken, *other, *root_cause(0, 1)]) == "KeyError: 'odd'."
    both = ["  rank      : 1 (local_rank: 1)", "  exitcode  : -9 (pid: 78)", *root_cause(0, 1)]
    assert "rank 1 was killed" in cause([*broken, *both])
    assert "another rank was lost" in cause(broken)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("The above exception was the direct cause of the following exception:", "B: last (caused by AError: first)."),
        ("During handling of the above exception, another exception occurred:", "B: last."),
    ],
)
def test_a_chain_of_exceptions_is_told_by_its_last(link: str, expected: str) -> None:
    text = cause([*TRACEBACK, "AError: first", "", link, "", *TRACEBACK, "x.B: last"])
    assert text == expected


def test_what_led_to_an_unknown_exception_is_told_where_it_is_known() -> None:
    link = "During handling of the above exception, another exception occurred:"
    lines = [*TRACEBACK, "OSError: [Errno 28] No space left on device", "", link, "", *TRACEBACK, "ValueError: odd"]
    assert "disk is full" in cause(lines)


def test_an_exception_within_the_text_of_another_is_found() -> None:
    lines = [
        *TRACEBACK,
        "RuntimeError: Caught KeyError in DataLoader worker process 0.",
        "Original Traceback (most recent call last):",
        *TRACEBACK[1:],
        "KeyError: 'odd'",
    ]
    assert cause(lines) == "KeyError: 'odd'."


def test_colours_and_progress_bars_hide_nothing() -> None:
    bar = " 15%|█▌        | 1005/6500 [00:21<01:55, 47.40it/s]"
    lines = [bar + TRACEBACK[0], *TRACEBACK[1:], "\x1b[1;31mValueError\x1b[0m: odd"]
    assert cause(lines) == "ValueError: odd."


def test_what_is_raised_while_python_ends_is_not_the_cause() -> None:
    ignored = [
        "Exception ignored in: <function Pool.__del__ at 0x7f>",
        *TRACEBACK,
        "OSError: [Errno 5] Input/output error",
    ]
    assert cause([*TRACEBACK, "ValueError: odd", *ignored]) == "ValueError: odd."


def test_a_script_that_went_on_after_a_torchrun_failed_of_something_else() -> None:
    first = [*of_rank(0, [*TRACEBACK, "ValueError: first"]), *WRAPPED, *root_cause(0, -9)]
    assert cause([*first, *TRACEBACK, "KeyError: 'second'"]) == "KeyError: 'second'."
    assert "no program lamafactory-cli" not in cause([*first, "x.sh: line 3: lamafactory-cli: command not found"], 1)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("night.sh: line 3: lamafactory-cli: command not found", "lamafactory-cli is not on the job's PATH"),
        ("night.sh: line 3: 4711 Killed                  python train.py", "line 3 of the script died (Killed)"),
        ("night.sh: line 3: /srv/gone.sh: No such file or directory", "/srv/gone.sh is not there"),
        ("torchrun: error: unrecognized arguments: --odd", "called wrongly (unrecognized arguments: --odd)"),
    ],
)
def test_what_a_script_could_not_run_is_named(line: str, expected: str) -> None:
    assert expected in cause([line], 1)
    assert cause([line, *TRACEBACK, "ValueError: odd"]) == "ValueError: odd."


def test_a_deep_traceback_is_read_to_its_end() -> None:
    assert cause([TRACEBACK[0], *TRACEBACK[1:] * 500, "ValueError: odd"]) == "ValueError: odd."
    box = ["╭── Traceback (most recent call last) ──╮", *["│ /opt/x.py:3 in main │"] * 500, "╰────╯"]
    assert cause([*box, "ValueError: odd"]) == "ValueError: odd."


@pytest.mark.parametrize(
    ("status", "word"),
    [(137, "SIGKILL"), (-9, "SIGKILL"), (143, "SIGTERM"), (134, "SIGABRT"), (139, "SIGSEGV"), (138, "10")],
)
def test_a_signal_is_named(status: int, word: str) -> None:
    text = cause([], status)
    assert word in text
    is_readable(text)


@pytest.mark.parametrize("status", [-1, 0, 1, 2, 255])
def test_an_exit_status_alone_tells_nothing(status: int) -> None:
    assert cause(["all is well"], status) == ""


def test_module_names_become_package_names() -> None:
    assert "pip install opencv-python-headless." in cause([*TRACEBACK, "ModuleNotFoundError: No module named 'cv2'"])
    assert "pip install swanlab." in cause([*TRACEBACK, "ModuleNotFoundError: No module named 'swanlab.env'"])


# ---- Any log at all ----


def test_what_cannot_be_read_tells_nothing(tmp_path: Path) -> None:
    assert explain(str(tmp_path / "gone.log"), 1) == ""
    assert explain("", 137) == ""
    assert explain("a\0b", 1) == ""
    assert explain(str(tmp_path), 1) == ""


def test_an_earlier_step_in_the_same_log_is_not_read(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    old = "\n".join([*TRACEBACK, "ValueError: old", ""])
    log.write_text(old + "\n".join([*TRACEBACK, "KeyError: 'new'"]))
    assert explain(str(log), 1, len(old)) == "KeyError: 'new'."
    log.write_text(old)
    assert explain(str(log), 1, len(old)) == ""


PIECES = st.sampled_from(
    [line.encode() for line in [*TRACEBACK, *WRAPPED, *root_cause(1, -9), "ValueError: odd", "[rank1]: ", "EJ0001: x"]]
    + [b"\r", b"\n", b"\0", b"\x1b[31m", b"\xff", b" 5%|x| 1/2 [0:0, 1it/s]", b"  what():  x", b"x.sh: line 3: y"]
    + [text.encode() for text in failures.CHAINED]
)


@given(st.lists(PIECES | st.binary(max_size=40), max_size=60), st.integers(-64, 255))
def test_any_output_can_be_explained(pieces: list[bytes], status: int) -> None:
    text = cause(b"".join(pieces).replace(b"\r", b"\n").decode("utf-8", "replace").split("\n"), status)
    assert text == "" or text.endswith((".", "..."))


@given(st.binary(max_size=300))
def test_any_log_can_be_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    log = tmp_path_factory.getbasetemp() / "any.log"
    log.write_bytes(data)
    explain(str(log), 1)


@pytest.mark.parametrize("kind", ["one endless line", "progress bars", "exceptions"])
def test_memory_stays_bounded_whatever_the_size_of_the_log(tmp_path: Path, kind: str) -> None:
    log = tmp_path / "big.log"
    body = {
        "one endless line": b"",
        "progress bars": b"\r 15%|xx        | 1005/6500 [00:21<01:55, 47.40it/s]" * 20_000,
        "exceptions": "\n".join([*TRACEBACK, "ValueError: survived", "text " * 100, ""]).encode() * 3_000,
    }[kind]
    with log.open("wb") as file:
        file.truncate(200 << 20)
        file.seek(0, 2)
        file.write(body + "\n".join(["", *TRACEBACK, "ValueError: odd"]).encode())
    tracemalloc.start()
    try:
        assert explain(str(log), 1) == "ValueError: odd."
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
