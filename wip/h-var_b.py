# %% [markdown]
# ## The ablation
#
# Now the question. [`ablate_variants.py`](ablate_variants.py) trains a GPT of 2 blocks and 64 dimensions on tales, once for each variant and seed, and records the loss of 256
# new stories in [`ablate_variants.csv`](ablate_variants.csv). All variants see the same stories in the same order with the same learning rate, tuned for none of them in particular. Two budgets:
#
# - **equal tokens**: all variants make the same number of steps;
# - **equal time**: a variant makes as many steps as fit into the time of the baseline's. The time of a step was measured first, in alternating runs, and recorded; so the
#   budget is a number of steps and no clock decides anything in a run.
#
# One run serves both: the learning rate stays constant, and for each budget a copy branches off and is cooled down to 0 in its last quarter.

# %%
table = pd.read_csv("ablate_variants.csv")
times = pd.read_csv("ablate_variants_time.csv").set_index("variant")
floor = table["floor"].iloc[0]
N_TARGETS = round((ablation.rows(ablation.validation_stories())[:, 1:] >= 0).sum().item() / ablation.N_VALIDATION)
long = table[table["recipe"] != "short"]
order = [name for name in ablation.VARIANTS if name in set(long["variant"])]
assert (long.groupby(["recipe", "variant"])["seed"].nunique() == 3).all()
row = long.iloc[0]
print(f"{len(order)} variants; baseline: {row.steps:,} steps of {ablation.BATCH} stories, {row.tokens:,} tokens")
print(f"entropy of the validation stories (floor): {floor:.1f} nats per story, {N_TARGETS} tokens each on average")

# %% [markdown]
# The table has the mean over 3 seeds, the spread between the best and the worst seed, and the difference from the baseline. `time` is the time of a step relative
# to the baseline's, the median of alternating rounds.

# %%
def summary(recipe: str) -> pd.DataFrame:
    """Mean and spread over the seeds, by variant."""
    groups = long[long["recipe"] == recipe].groupby("variant")["validation_loss"]
    return pd.DataFrame({"loss": groups.mean(), "spread": groups.max() - groups.min()}).loc[order]


tokens, seconds = summary("equal-tokens"), summary("equal-time")
cache = {name: cache_bytes(replace(ablation.BASE, **ablation.VARIANTS[name]), 256) // 1024 for name in order}
results = pd.DataFrame(
    {
        "parameters": long.groupby("variant")["parameters"].first().loc[order],
        "cache KiB": pd.Series(cache),
        "time": times["ratio"].loc[order],
        "equal tokens": tokens["loss"].round(1),
        "spread": tokens["spread"].round(1),
        "against gpt2": (tokens["loss"] - tokens["loss"]["gpt2"]).round(1),
        "equal time": seconds["loss"].round(1),
        "times floor": (seconds["loss"] / floor).round(2),
    }
)
results

# %%
figure, axes = plt.subplots(figsize=(7.6, 5.6))
for position, name in enumerate(reversed(order)):
    for recipe, color, shift in (("equal-tokens", BLUE, 0.14), ("equal-time", ORANGE, -0.14)):
        values = long[(long["variant"] == name) & (long["recipe"] == recipe)]["validation_loss"]
        axes.plot(values, [position + shift] * len(values), "o", color=color, markersize=4, alpha=0.7)
        axes.plot([values.mean()] * 2, [position + shift - 0.13, position + shift + 0.13], color=color)
axes.set_yticks(range(len(order)), reversed(order))
axes.axvline(tokens["loss"]["gpt2"], color=GREY, linewidth=1, linestyle=":")
axes.set_xlabel(f"nats per story (floor: {floor:.1f})")
axes.set_title(f"The best mean of {len(order)} variants at equal tokens: {tokens['loss'].idxmin()}")
axes.text(0.98, 0.97, "equal tokens", color=BLUE, transform=axes.transAxes, ha="right")
axes.text(0.98, 0.93, "equal time", color=ORANGE, transform=axes.transAxes, ha="right")
plt.show()

# %% [markdown]
# Each dot is a seed, each bar a mean; the dotted line is the baseline at equal tokens. All variants are still far above the floor: the runs are short, the models small.
# So this is a table about *how fast a small model learns*, and the dots say how far it can be trusted.
#
# ### Which step helps?
#
# A step is judged against the variant that it started from, seed by seed, since equal seeds saw equal stories. We call it better or worse only if all three seeds agree.

# %%
STEPS = {
    "RMSNorm": ("gpt2", "gpt2, RMSNorm"),
    "rotary": ("gpt2, RMSNorm", "RMSNorm, rotary"),
    "SwiGLU": ("RMSNorm, rotary", "RMSNorm, rotary, SwiGLU"),
    "no biases (= Llama)": ("RMSNorm, rotary, SwiGLU", "llama"),
    "GQA, 2 of 4 heads": ("llama", "llama, GQA"),
    "QK norm (= Qwen3)": ("llama, GQA", "qwen3"),
    "window of 32": ("qwen3", "qwen3, window"),
    "mixture of 4 experts": ("qwen3", "qwen3, MoE"),
    "its balance loss": ("qwen3, MoE unbalanced", "qwen3, MoE"),
    "no positions at all": ("gpt2", "gpt2, no positions"),
    "all of Llama": ("gpt2", "llama"),
}
by_seed = long.pivot_table("validation_loss", ["recipe", "variant"], "seed")


def judge(recipe: str, before: str, after: str) -> str:
    """Mean difference over the seeds and whether all of them agree about its sign."""
    change = by_seed.loc[(recipe, after)] - by_seed.loc[(recipe, before)]
    verdict = "better" if change.max() < 0 else "worse" if change.min() > 0 else "undecided"
    return f"{change.mean():+.1f} {verdict}"


steps = {name: {recipe: judge(recipe, *pair) for recipe in ("equal-tokens", "equal-time")} for name, pair in STEPS.items()}
pd.DataFrame(steps).T

# %% [markdown]
# STEP PROSE

# %%
loads = long[long["recipe"] == "equal-tokens"].groupby("variant")["largest_load"].mean()
for name in ("qwen3, MoE", "qwen3, MoE unbalanced"):
    print(f"{name:22}: the busiest of 4 experts gets {loads[name]:.0%} of the choices; even would be 25 %, at most 50 %")
assert loads["qwen3, MoE"] < loads["qwen3, MoE unbalanced"]

# %% [markdown]
# ### The same live
#
# A record can be believed more easily if a part of it is made again. The recipe `short` of the script, one seed, two variants:

# %%
live = {}
for name in ablation.SHORT:
    trained = ablation.train(name, 0, [ablation.RECIPES["short"].steps])[0]
    live[name] = ablation.validate(trained.model)[0]
    recorded = table.query("recipe == 'short' and variant == @name and seed == 0")["validation_loss"].item()
    assert abs(live[name] - recorded) < 0.02 * recorded, (live[name], recorded)
    print(f"{name:5} after {trained.steps} steps: within 2 % of the recorded loss of {recorded:.0f} nats per story")
assert live["llama"] < 0.95 * live["gpt2"]

# %% [markdown]
# Not the last decimals are compared, since another processor adds in another order and training amplifies it; 2 % is a fraction of the difference between the two variants.
#
# ## A trained model: `tales-tiny`
#
# The course ships `tales-tiny`: the shape of `llama` above, trained much longer (chapter 5 shows how). Its file has our own names, without the tied head.

# %%
folder = Path("../shared/checkpoints/tales-tiny")
config = GPTConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"])
tiny = GPTModel(config).eval()
keys = tiny.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
assert (keys.missing_keys, keys.unexpected_keys) == (["output_head.weight"], [])
print(f"{tiny.n_parameters:,} parameters, context {config.context_length}")
trained_loss = ablation.validate(tiny)[0]
print(f"{trained_loss:.1f} nats per story, {trained_loss / floor - 1:.0%} above the floor of {floor:.1f}")
assert floor < trained_loss < tokens["loss"].min()

# %%
record("tales-tiny, loss", round(trained_loss, 1), "nats per story", f"floor {floor:.1f}")

# %% [markdown]
# It is better than all variants of the ablation, because it saw many more stories. What do its heads do, with rotary positions? We catch what each block's attention is given and
# ask it for its weights.

# %%
encoding = tale_encoding()
story = TaleGenerator(7).sample().text
ids = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(story)]])
inputs = []
hooks = [block.attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in tiny.blocks]
with torch.no_grad():
    tiny(ids)
    for hook in hooks:
        hook.remove()
    maps = torch.cat([b.attention(x, need_weights=True)[1][0] for b, x in zip(tiny.blocks, inputs, strict=True)])
place = torch.arange(ids.shape[1])
distance = (maps * (place[:, None] - place)).sum(dim=2)[16:].mean(dim=1)  # (heads of all blocks,)
names = [f"block {1 + i // config.n_heads}, head {1 + i % config.n_heads}" for i in range(len(distance))]
near, far = int(distance.argmin()), int(distance.argmax())
print(f"mean distance looked back: {names[near]} {distance[near]:.0f} tokens, {names[far]} {distance[far]:.0f} tokens")
assert distance[far] > 2 * distance[near]

# %%
shown = [encoding.decode([i]).replace("\n", "¶") for i in ids[0, 1:31].tolist()]
figure, panels = plt.subplots(1, 2, figsize=(11, 5.2))
for axes, head in zip(panels, (near, far), strict=True):
    axes.imshow(maps[head, 1:31, 1:31], cmap="Blues", aspect="auto")
    axes.set_xticks(range(30), shown, rotation=90, fontsize=7)
    axes.set_yticks(range(30), shown, fontsize=7)
    axes.set(xlabel="token looked at", title=names[head])
    axes.grid(False)
panels[0].set_ylabel("token that looks")
figure.suptitle("One head watches its neighbours, another the beginning of the story", x=0.02, ha="left", fontsize=12)
plt.show()

# %% [markdown]
# Each row is a token of a story, each column one that it can look at; darker means more weight. On the left the head that looks back least on average, on the right the one that looks back most.
#
# ### A window put on afterwards
#
# How far back does the model have to see? The same weights with a window: nothing is trained.

# %%
def with_options(model: GPTModel, **options: object) -> GPTModel:
    """The same weights in a model whose configuration differs in options that have no weights."""
    other = GPTModel(replace(model.config, **options)).eval()
    other.load_state_dict(model.state_dict())
    return other


windows = [8, 16, 32, 64, 128, None]
by_window = {str(w): ablation.validate(with_options(tiny, window=w))[0] for w in windows}
print({name: round(loss, 1) for name, loss in by_window.items()}, f"floor {floor:.1f}")
assert by_window["8"] > by_window["32"] > by_window["128"] > 0.99 * by_window["None"]

# %% [markdown]
# A story names a person or a thing early and returns to it late; a model trained with full attention relies on that, and a short window takes it away. The ablation
# shows the fairer comparison, with models that were trained with their window.
