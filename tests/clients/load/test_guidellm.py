"""guidellm: a short run."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_short_run(url: str, tokenizer: str, tmp_path: Path) -> None:
    report = tmp_path / "run.json"
    command = [
        *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={url},model=base"),
        *("--profile", "kind=synchronous"),
        *("--constraint", "kind=max_requests,count=4"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
        *("--output", f"kind=json,path={report}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    assert len(benchmark["requests"]["successful"]) == 4
    assert not benchmark["requests"]["errored"]
