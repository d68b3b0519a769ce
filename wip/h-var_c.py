# %% [markdown]
# ## Longer contexts
#
# `tales-tiny` was trained on single stories of at most some 200 tokens. What if it must read four in a row? Its context becomes 1,024, four times the trained one. Rotary positions have an
# angle for every position, so nothing stops it; but keys that are 800 tokens away are something it has never seen. First: is it the *position* or the *distance* that is new?

# %%
rows = ablation.rows(TaleGenerator(11).stories(32))
longer = with_options(tiny, context_length=1024)
with torch.no_grad():
    losses = {}
    for start in (0, 700):
        logits = longer(rows[:, :-1].clamp(min=0), positions=start + torch.arange(rows.shape[1] - 1))
        chosen = logits.log_softmax(dim=2).gather(2, rows[:, 1:, None].clamp(min=0))[..., 0]
        losses[start] = -(chosen * (rows[:, 1:] >= 0)).sum(dim=1)
compare("story losses at position 0 and at position 700", losses[0], losses[700], tolerance=0.05)

# %% [markdown]
# A single story at positions 700 and later is as easy as at 0: scores depend on distances only. So what is new in four stories are the large distances. The remedies change the angles
# (chapter 2 built them): *linear* interpolation divides all by the factor, so that 1,024 positions look like 256; *NTK-aware* scaling enlarges the base; *YaRN* and *Llama 3* slow the slow
# pairs down and leave the fast ones alone. We read 32 rows of four stories and take the loss of the first, second, third and fourth story.

# %%
def rows_of_four(seed: int, n_rows: int) -> tuple[Tensor, Tensor]:
    """Ids (rows, tokens) of four stories one after the other, -1 at the end; and for each target its story 0 to 3."""
    ids, numbers = [], []
    for _ in range(n_rows):
        stories = [torch.tensor([*encoding.encode_ordinary(s.text), encoding.eot_token]) for s in TaleGenerator(seed).stories(4)]
        ids.append(torch.cat([torch.tensor([encoding.eot_token]), *stories]))
        numbers.append(torch.cat([torch.full((len(s),), i) for i, s in enumerate(stories)]))
        seed += 1
    pad = nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=-1), pad(numbers, batch_first=True, padding_value=-1)


@torch.no_grad()
def losses_by_place(model: GPTModel, ids: Tensor, numbers: Tensor) -> list[float]:
    """Mean loss in nats of the first, second, third and fourth stories of the rows."""
    losses = torch.cat([ablation.story_losses(model, part) for part in ids.split(8)])
    return [losses[numbers == i].sum().item() / len(ids) for i in range(4)]


four, number = rows_of_four(seed=500, n_rows=32)
scalings = {"no scaling": {}, "window 200": {"window": 200}}
for kind in ("linear", "ntk", "yarn", "llama3"):
    scalings[kind] = {"rope_scaling": kind, "rope_factor": 4.0, "rope_original_length": 256}
models = {name: with_options(tiny, context_length=1024, **options) for name, options in scalings.items()}
by_place = pd.DataFrame(
    {name: losses_by_place(model, four, number) for name, model in models.items()}, ["first", "second", "third", "fourth"]
).T
by_place.round(0).astype(int)

# %% [markdown]
# CONTEXT PROSE 1
#
# ### After a short training on long rows
#
# Scaling was invented to be followed by a short training with long rows. We give 60 steps of two rows each to three of them, and to the model without scaling.

# %%
def fine_tuned(model: GPTModel, n_steps: int = 60) -> GPTModel:
    """The model after a short training on rows of four stories, the learning rate falling linearly to 0."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3, fused=True)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / n_steps)
        ids, places = rows_of_four(seed=10_000 + 2 * step, n_rows=2)
        loss = ablation.story_losses(model, ids).sum() / (places >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


after = {}
for name in ("no scaling", "linear", "ntk", "yarn"):
    trained = fine_tuned(with_options(tiny, context_length=1024, **scalings[name]))
    after[name] = losses_by_place(trained, four, number)
after = pd.DataFrame(after, by_place.columns).T
after.round(0).astype(int)

# %%
figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
colors = dict(zip(by_place.index, (BLACK, SKY, BLUE, ORANGE, GREEN, PURPLE), strict=True))
for axes, frame, title in zip(panels, (by_place, after), ("as trained", "after 60 steps on long rows"), strict=True):
    for name, row in frame.iterrows():
        axes.plot(range(1, 5), row, marker="o", markersize=4, color=colors[name], label=name)
    axes.axhline(floor, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlabel="place of the story in its row", title=title, xticks=range(1, 5), ylim=(0, None))
panels[0].set_ylabel("nats per story (dotted: floor)")
panels[0].legend(fontsize=9, ncols=2)
figure.suptitle("CONTEXT FINDING", x=0.02, ha="left", fontsize=12)
plt.show()

# %% [markdown]
# CONTEXT PROSE 2
