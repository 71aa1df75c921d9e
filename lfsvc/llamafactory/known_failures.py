"""What a failed step says → the cause in plain words, and what to do: the table that failures.py reads.

Source: outputs of LLaMA-Factory 0.9.3 and public reports, kept in tests/data/failures.
"""

from __future__ import annotations

DEVICE_MEMORY = (
    "Lower per_device_train_batch_size (or per_device_eval_batch_size) or cutoff_len, or use more devices, "
    "quantization_bit or DeepSpeed ZeRO-3."
)
HOST_MEMORY = "`journalctl -k` shows it; lower preprocessing_num_workers and dataloader_num_workers, or free memory."
SHARED_MEMORY = "Lower dataloader_num_workers or enlarge /dev/shm (in a container: --shm-size)."
DISK = "Free space there, lower save_total_limit or raise save_steps; the last whole checkpoint can be resumed from."
PORT = "Unset MASTER_PORT, so that a free one is taken, or wait for the job that holds it."
HANG = "Look in the log for an error of another rank; where one is merely slow, raise ddp_timeout."
INSTALL = "Install it where llamafactory-cli is: pip install {install}."
HUB = "Download it beforehand and give the folder, or unset HF_HUB_OFFLINE where this machine has a network."
NOT_ITS_FAULT = "That is not the job's fault: submit it again."
NEW_COPY = "Correct the path, or copy or download it anew (a git-lfs pointer is no model)."
FROM_FOLDER = "A relative path is taken from the working directory of the submission."
LFSVC_PATH = "Run `lfsvc setup` in the environment that has it, or submit with --env PATH=..."

# (what the exception says, the cause, what to do). The first row that matches is it: special ones come before
# general ones. Both sentences may use the named groups.
KNOWN: tuple[tuple[str, str, str], ...] = (
    # Memory
    (r"(?P<device>CUDA|NPU|HIP|XPU) out of memory\. Tried to allocate (?P<size>[\d.]+ \w+)",
     "a device ran out of memory ({device}, at an allocation of {size})", DEVICE_MEMORY),
    (r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|\bEL0004\b", "a device ran out of memory", DEVICE_MEMORY),
    (r"DataLoader worker .*signal: Bus error|/dev/shm/nccl|</torch_\d|No space left.*\n.*multiprocessing/synchronize",
     "shared memory (/dev/shm) ran out", SHARED_MEMORY),
    (r"DataLoader worker .*killed by signal: Killed|process pool was terminated abruptly|subprocesses has abruptly",
     "a worker process was killed, nearly always by the kernel short of memory", HOST_MEMORY),
    (r"can't allocate memory: you tried to allocate (?P<size>\d+) bytes",
     "the machine's memory, or a limit on it, ran out (at an allocation of {size} bytes)", HOST_MEMORY),
    (r"^MemoryError|\[Errno 12\]|Cannot allocate memory|std::bad_alloc",
     "the machine's memory, or a limit on it, ran out", HOST_MEMORY),
    # Disks and files
    (r"Disk quota exceeded", "your disk quota is used up", DISK),
    (r"No space left on device: '(?P<path>[^']+)'", "the disk of {path} is full", DISK),
    (r"No space left on device|\(os error 28\)|PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+",
     "a disk is full", DISK),
    (r"Too many open files", "the limit of open files is reached",
     "Lower dataloader_num_workers, or have the hard limit (`ulimit -Hn`) raised."),
    (r"(?P<what>Read-only file system|Permission denied): '(?P<path>[^']+)'", "{path} cannot be used: {what}",
     "Change its owner or mode, or choose another folder."),
    (r"Stale file handle|Input/output error", "a disk or network file system reported an error",
     "`dmesg` says more; run it again once the file system is well."),
    # Ports and other ranks
    (r"port: (?P<port>\d+)\b.*EADDRINUSE|(?P<host>\S{1,60}):(?P<number>\d+) \(errno: 98",
     "the rendezvous port {port}{number} is in use", PORT),
    (r"EADDRINUSE|errno: 98\b|[Aa]ddress already in use", "the rendezvous port is in use", PORT),
    (r"\b(?P<code>EJ0003|EI0019)\b", "the HCCL port of the NPU is in use ({code})",
     "Wait for the job that holds it, or give this one another HCCL_IF_BASE_PORT."),
    (r"\bEJ0001\b", "a process of an earlier training still holds the NPU (EJ0001)",
     "Wait ten seconds and submit again; `npu-smi info` shows who holds it."),
    (r"Watchdog caught collective operation timeout: \w+\([^)]*OpType=(?P<what>\w+)",
     "a rank waited for the others until the timeout (NCCL, {what}): one of them hung or was slower", HANG),
    (r"\b(?P<code>EI0002|EI0006)\b", "a rank waited for the others until the timeout (HCCL, {code}): one hung or died",
     HANG + " HCCL has its own HCCL_EXEC_TIMEOUT and HCCL_CONNECT_TIMEOUT."),
    (r"collective operation timeout|Timed out waiting \d+ms|wait timeout after \d+ms|got error: .*Socket Timeout"
     r"|Timed out after \d+ seconds waiting for clients",
     "a rank waited for the others until the timeout: one of them hung, died or was slower", HANG),
    (r"gloo/transport|remote process exited|Connection closed by peer", "another rank was lost, and with it this one",
     "Look in the log for that rank's error; where there is none, it was killed: see `journalctl -k`."),
    (r"Duplicate GPU detected", "two ranks were given the same GPU",
     "Set NPROC_PER_NODE to the number of devices, or name as many after @."),
    (r"NCCL error.*unhandled (?P<what>system|cuda) error", "NCCL met a {what} error", "Submit once with "
     "`--env NCCL_DEBUG=INFO`, which prints the reason: often /dev/shm, a network interface or the driver."),
    # Devices
    (r"device-side assert triggered", "an index was out of range on the GPU, often a token beyond the vocabulary",
     "Check that tokenizer, template and resize_vocab fit the model; `--env CUDA_LAUNCH_BLOCKING=1` shows the place."),
    (r"no kernel image is available", "the installed torch (or a CUDA extension) has no code for this GPU",
     "Install a build of torch for this GPU's generation."),
    (r"invalid device ordinal|Invalid device ID|\b107001\b", "a device was asked for that is not there",
     "Check the devices after @ and NPROC_PER_NODE against those of the machine."),
    (r"not compiled with CUDA|Found no NVIDIA driver|driver on your system is too old|driver version is insufficient"
     r"|cudaGetDeviceCount|no CUDA-capable device|CUDA unknown error", "torch cannot use the GPU",
     "Check `nvidia-smi`, and that the installed torch is a CUDA build for this driver."),
    (r"CUDA error: (?P<what>an illegal memory access|unspecified launch failure|.*ECC error|.*busy or unavailable)",
     "the GPU reported an error ({what})", "Run it again; if it repeats, check the device (`nvidia-smi`, `dmesg`)."),
    (r"doesn't support bf16|does not support `pure_bf16`", "the device has no bf16", "Set fp16 instead of bf16."),
    (r"Attempting to unscale FP16 gradients", "fp16 cannot train weights that are themselves fp16", "Set bf16."),
    (r"^AssertionError: \n.*elastic/agent/server/api\.py", "torchrun was asked for no process: no device is visible",
     "Check the driver and the devices after @; without any device set NPROC_PER_NODE=1."),
    # output_dir and checkpoints
    (r"Output directory .*already exists and is not empty", "output_dir holds the results of an earlier training",
     "Choose another one, or set overwrite_output_dir: true or resume_from_checkpoint."),
    (r"FileExistsError: .*'(?P<path>[^']+)'|`(?P<key>save_dir)` already exists", "{path}{key} already exists",
     "Choose another folder or remove it."),
    (r"Can't find a valid checkpoint at (?P<path>.+)", "resume_from_checkpoint: there is no checkpoint in {path}",
     "Name a checkpoint-N folder, or leave the key out: the newest is then found."),
    (r"serious vulnerability issue in `torch\.load`", "this torch is too old for transformers to load pickled files",
     "Update torch to 2.6 or later, or use weights in safetensors format."),
    (r"Weights only load failed", "a checkpoint cannot be unpickled by this torch",
     "Resume with the torch, numpy and DeepSpeed that wrote it, or start without resume_from_checkpoint."),
    # The YAML
    (r"Some (?:keys|specified arguments) are not used by the HfArgumentParser: \[(?P<keys>[^\]\n]*)",
     "LLaMA-Factory does not know the key {keys}", "Correct or remove it; the keys depend on the version."),
    (r"^(?:Scanner|Parser|Composer|Constructor|Reader)Error: (?P<what>[^\n]*)(?:.|\n)*?line (?P<line>\d+)",
     "the YAML cannot be read (line {line}: {what})", "Correct its indentation, colons and quotes there."),
    (r"codec can't decode byte", "a file is not in the encoding that Python expects",
     "Save it as UTF-8; where it is, submit with `--env PYTHONUTF8=1`."),
    (r"'[<>]=?' not supported between instances of '(?:float|int|str)' and '(?:str|int|float)'",
     "a number in the YAML was read as text", "Write 1.0e-4 instead of 1e-4, and numbers without quotes."),
    (r"FORCE_TORCHRUN=1` to launch DeepSpeed", "DeepSpeed needs torchrun, and FORCE_TORCHRUN is off",
     "Submit without `--env FORCE_TORCHRUN=0`."),
    (r"launch distributed training with `llamafactory-cli`", "several devices are visible, and FORCE_TORCHRUN is off",
     "Submit without `--env FORCE_TORCHRUN=0`, or with one device after @."),
    (r"Distributed training does not support (?P<what>[^.\n]+)|(?P<kind>\w+-\w+ BAdam) (?:does not yet|only) support",
     "{what}{kind} does not work under torchrun", "Submit with `--env FORCE_TORCHRUN=0` and one device."),
    (r"Template (?P<name>\S+) does not exist", "there is no template {name}",
     "Correct `template`; the list is in LLaMA-Factory's README and depends on the version."),
    (r"Target modules \{?(?P<name>[^}\n]{1,200}?)\}? (?:was |were )?not found in the base model",
     "lora_target: the model has no module {name}", "Name modules of this model, or set lora_target: all."),
    (r"Evaluation will be deprecated", "`llamafactory-cli eval` was removed in LLaMA-Factory 0.9.4",
     "Evaluate with do_eval or do_predict in a training YAML."),
    (r"sure eval_dataset be provided|dataset for evaluation|requires an eval_dataset|if `eval_dataset` is None",
     "an evaluation is asked for, but there is no data for it",
     "Set eval_dataset or val_size, or leave do_eval, do_predict and eval_strategy out."),
    (r"specify dataset for training", "do_train is set, but no data set is named", "Set `dataset`."),
    # Data
    (r"Undefined dataset (?P<name>\S+) in (?P<file>\S+?)\.?$", "there is no data set {name} in {file}",
     "Correct `dataset`, or add it to the {file} in dataset_dir."),
    (r"Cannot open (?P<path>\S+) due to", "{path} cannot be opened", "Check dataset_dir. " + FROM_FOLDER),
    (r"File (?P<path>\S+) not found", "the data file {path} is not there",
     "Correct file_name in dataset_info.json or dataset_dir."),
    (r"JSON parse error: (?P<what>.+)|JSONDecodeError: (?P<json>.+)", "a data file is not valid JSON ({what}{json})",
     "Correct that file; `python -m json.tool FILE` names the line."),
    (r"^KeyError: '(?P<key>instruction|output|conversations|messages|from|value|role|content|chosen|rejected|prompt)'",
     "a sample of the data set has no {key}", "Set `formatting`, `columns` and `tags` in dataset_info.json to fit it."),
    (r"Cannot find (?:sufficient|valid) samples|not applicable in the current training stage",
     "the data set does not fit: none of its samples can be used",
     "Check `stage`, and `columns`, `formatting` and `ranking` in dataset_info.json."),
    (r"test_size=.*train set will be empty", "the data set is too small for val_size", "Lower val_size."),
    (r"number of (?P<what>images|videos|audios) does not match|(?P<kind>Image|Video) features and .*tokens do not",
     "a sample has more or fewer media than placeholders", "Correct it, or raise cutoff_len where that cuts them off."),
    # Models
    (r"Cannot merge adapters to a quantized model|merge adapters before quantizing",
     "an adapter cannot be merged into a quantised model", "Merge it into the unquantised base."),
    (r"size mismatch for (?P<name>\S+): copying a param with shape .*?(?P<old>\[[^\]]*\]).*?(?P<new>\[[^\]]*\])",
     "adapter or checkpoint and model do not fit: {name} is {old} here and {new} there",
     "Use the base model that it was trained on, with the same resize_vocab."),
    (r"gated repo", "the model or data set is gated on Hugging Face",
     "Ask for access on its page and submit with `--env HF_TOKEN=...`, or give a local folder."),
    (r"40[13] Client Error", "the hub refused access", "Submit with `--env HF_TOKEN=...`, or give a local folder."),
    (r"(?:find|find a) 'adapter_config\.json' at '(?P<path>[^']+)'", "there is no adapter in {path}",
     "Correct adapter_name_or_path. " + FROM_FOLDER),
    (r"Unrecognized model in (?P<path>\S+)\. Should have|(?P<folder>\S{1,300}) does not appear to have a file named"
     r"|Error no file named .* in directory (?P<directory>\S+?)\.?$", "{path}{folder}{directory} is not a whole model",
     NEW_COPY),
    (r"Repo id must .*: '(?P<path>[^']+)'|^\w+: (?P<folder>/\S+) is not a local folder",
     "there is no folder {path}{folder}", "Correct model_name_or_path, adapter_name_or_path, task_dir. " + FROM_FOLDER),
    (r"SafetensorError|HeaderTooLarge|incomplete metadata", "a file of weights is damaged or incomplete", NEW_COPY),
    (r"(?P<name>[\w.-]{1,99}/[\w.-]{1,99}) is not a local folder and is not a valid model identifier",
     "the hub knows no model {name}", "Correct model_name_or_path."),
    (r"Couldn't reach '?(?P<name>[\w./-]+)", "the data set {name} is neither here nor on a reachable hub", HUB),
    (r"couldn't connect to|OfflineModeIsEnabled|outgoing traffic has been disabled|cannot find the requested files in"
     r"|MaxRetryError|Name or service not known|Temporary failure in name resolution",
     "a model or data set is not on this machine, and the hub cannot be reached", HUB),
    (r"model type `(?P<name>[^`]+)` but Transformers does not recognize", "this transformers does not know {name}",
     "Update transformers, and LLaMA-Factory with it."),
    (r"trust_remote_code=True|execute the (?:configuration|modeling) file", "the model brings code of its own",
     "Set trust_remote_code: true if you trust it."),
    # Programs and packages
    (r"api_key not configured|EOFError: EOF when reading", "a program asked a question, and nobody is there to answer",
     "Log in beforehand (wandb, swanlab: an API key in the environment), or set report_to: none."),
    (r"No such file or directory: '(?P<name>torchrun|ninja|nvcc|git)'|: (?P<command>\S+): command not found",
     "the program {name}{command} is not on the job's PATH", LFSVC_PATH),
    (r"pip3? install (?:-\S+ )*[`'\"]?(?P<package>[\w.-]+)", "the Python package {package} is missing or does not fit",
     INSTALL),
    (r"No module named '(?P<package>\w+)|No package metadata was found for (?P<name>[\w.-]+)",
     "the Python package {package}{name} is missing", INSTALL),
    (r"CUDA_HOME|Error building extension|does not match the version torch was compiled with",
     "a CUDA extension cannot be built", "Install the CUDA toolkit of torch's version and set CUDA_HOME."),
    (r"line (?P<line>\d+): +\d+ (?P<what>Killed|Aborted|Bus error|Segmentation fault)",
     "what runs in line {line} of the script died ({what})", HOST_MEMORY),
    (r"No such file or directory: '(?P<path>[^']+)'|: line \d+: (?P<file>.+): No such file or directory",
     "{path}{file} is not there", FROM_FOLDER),
    (r"^[\w./-]+: error: (?P<what>.+)", "a program was called wrongly ({what})", "Correct its arguments."),
    (r"SignalException: .*got signal: (?P<number>\d+)", "it was ended from outside (signal {number})", NOT_ITS_FAULT),
    (r"^KeyboardInterrupt", "it was interrupted from outside (SIGINT)", NOT_ITS_FAULT),
    (r"\b(?P<code>E[A-Z0-9]\d{4})\)?: (?:\[PID: \d+\] ?)?(?:\d{4}-[\d:.-]+ )?(?P<what>.+)",
     "the NPU's software reported {code}: {what}", "CANN's documentation explains it; its logs lie in ~/ascend/log."),
)  # fmt: skip

# What a rank says when another one died: it yields to anything else.
CONSEQUENCES = (
    r"gloo/|Connection closed by peer|recvValue failed|failed to recv, got 0 bytes|remote process exited|"
    r"NCCL communicator was aborted|Socket closed|TCPStore|Broken pipe"
)

# They only say that a process below them failed.
WRAPPERS = frozenset({"ChildFailedError", "CalledProcessError", "RemoteTraceback", "ProcessRaisedException"})

# Modules whose package on the index has another name.
PACKAGES = {
    "PIL": "pillow", "cv2": "opencv-python-headless", "flash_attn": "flash-attn", "rouge_chinese": "rouge-chinese",
    "sklearn": "scikit-learn", "torch_npu": "torch-npu", "yaml": "PyYAML",
}  # fmt: skip

# Signal → cause, what to do. With 6, 7 and 11 the last words of native code come first: they say more.
SIGNALS = {
    2: ("it was interrupted from outside (SIGINT)", NOT_ITS_FAULT),
    6: ("native code aborted (SIGABRT)", "The lines before the end of the log say what it complained of."),
    7: ("shared memory or a mapped file could not be read or written (SIGBUS)", SHARED_MEMORY),
    9: ("{who} was killed (SIGKILL), nearly always by the kernel short of memory", HOST_MEMORY),
    11: ("native code crashed (SIGSEGV)", "Check that torch, driver and compiled packages (flash-attn) fit."),
    15: ("{who} was ended from outside (SIGTERM)", NOT_ITS_FAULT),
}  # fmt: skip
