// Filters of the report. Only reads attributes and text of the page, and only hides; no markup is ever made here.
"use strict";
(() => {
  const form = document.getElementById("filters");
  const [search, task, low, high, grid] = ["search", "task", "low", "high", "grid"].map((id) => document.getElementById(id));
  const shown = document.getElementById("shown");
  const none = document.getElementById("none");
  const items = Array.from(document.querySelectorAll("article.item"), (element) => ({
    element,
    reason: element.dataset.reason,
    task: element.dataset.task,
    score: element.dataset.score === undefined ? null : Number(element.dataset.score),
    text: null, // read when first searched: 500 items are a few megabytes
  }));

  const textOf = (item) => (item.text ??= item.element.textContent.toLowerCase());

  const bound = (input, otherwise) => (input.value === "" || !input.validity.valid ? otherwise : Number(input.value));

  const apply = () => {
    const reasons = new Set(Array.from(form.querySelectorAll("input[name=reason]:checked"), (box) => box.value));
    const from = bound(low, -Infinity);
    const to = bound(high, Infinity);
    const isBounded = from !== -Infinity || to !== Infinity;
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const item of items) {
      const fits =
        reasons.has(item.reason) &&
        (task.value === "" || item.task === task.value) &&
        (item.score === null ? !isBounded : from <= item.score && item.score <= to) &&
        words.every((word) => textOf(item).includes(word));
      item.element.hidden = !fits;
      count += fits;
    }
    shown.textContent = `${count} of ${items.length} items`;
    none.hidden = count > 0;
  };

  let waiting = 0;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, 80);
  });
  grid.addEventListener("input", () => document.body.classList.toggle("no-slices", !grid.checked));
  form.addEventListener("reset", () =>
    setTimeout(() => {
      document.body.classList.remove("no-slices");
      apply();
    }),
  );
  form.addEventListener("submit", (event) => event.preventDefault());

  form.hidden = false;
  form.reset();
})();
