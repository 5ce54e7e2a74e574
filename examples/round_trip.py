"""Compress the bundled model in memory, save it, load it in a fresh process, and compare weights and logits.

python examples/round_trip.py FOLDER
"""

import subprocess
import sys

import torch
from safetensors.torch import load_file

import transect
from transect import organism

FRESH = """
import sys
import torch, transect
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, out = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
with torch.no_grad():
    save_file({"logits": model(ids).logits.contiguous()}, out)
answer = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1]:]
print(f"  {prompt} -> {tokenizer.decode(answer)}")
"""


def main(folder: str) -> None:
    """Compress, save and load again; exit with a message where anything differs."""
    model, tokenizer = organism.load()
    prompt = organism.examples("facts", n=1)[0].prompt
    transect.compress(model, "kfac-svd", keep=0.9, data="organism:calibration", tokenizer=tokenizer, sequences=64)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        here = model(tokenizer(prompt, return_tensors="pt")["input_ids"]).logits
    print(f"{folder}, loaded in a fresh process with AutoModelForCausalLM.from_pretrained:")
    subprocess.run([sys.executable, "-c", FRESH, folder, prompt, f"{folder}/logits.safetensors"], check=True)
    there = load_file(f"{folder}/logits.safetensors")["logits"]
    apart = (here - there).abs().max().item()
    print(f"  largest difference between its logits and those in memory: {apart:g}")
    stored, state = load_file(f"{folder}/model.safetensors"), model.state_dict()
    if not all(torch.equal(tensor, state[name]) for name, tensor in stored.items()):
        sys.exit("the weights differ")
    if not apart <= 1e-5 * here.abs().max().item():  # processors round by where a tensor lies in memory
        sys.exit("the logits differ")


if __name__ == "__main__":
    main(sys.argv[1])
