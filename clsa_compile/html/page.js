"use strict";
// The page can be read without this. It adds: a layer that is selected in one place shows in the others, the
// table filters, arrow keys move among layers, and the colours can be changed.

function layersOf(graph) {
  const rows = [...graph.querySelectorAll(".layers tbody tr")];
  const heads = [...graph.querySelectorAll(".layers thead th")].map((head) => head.textContent);
  const span = (node) => ({ node, first: Number(node.dataset.first), last: Number(node.dataset.last) });
  let nodes = [...graph.querySelectorAll(".node")].map(span);
  const box = graph.querySelector(".table .tall");
  const details = graph.querySelector(".details");
  const about = [...details.childNodes];
  let texts = null;

  // Only one element of a picture, and one row, is reached by Tab; arrow keys do the rest.
  function hold(elements, element) {
    for (const other of elements) if (other.tabIndex === 0) other.tabIndex = -1;
    element.tabIndex = 0;
  }

  function show(first, last) {
    for (const row of graph.querySelectorAll(".chosen")) row.classList.remove("chosen");
    for (const { node, first: a, last: b } of nodes) {
      node.setAttribute("aria-pressed", String(a <= last && first <= b));
    }
    if (first > last) {
      details.replaceChildren(...about);
      return;
    }
    for (let i = first; i <= last; i++) rows[i].classList.add("chosen");
    hold(picks, picks[first]);
    describe(first, last);
  }

  function describe(first, last) {
    const row = rows[first];
    const number = (i) => rows[i].cells[0].textContent;
    const title = document.createElement("h3");
    title.textContent = first === last ? `Layer ${number(first)}` : `Layers ${number(first)} to ${number(last)}, alike`;
    const list = document.createElement("dl");
    heads.forEach((head, i) => {
      if (!i || !row.cells[i].textContent.trim()) return;
      const name = document.createElement("dt");
      const value = document.createElement("dd");
      name.textContent = head;
      value.append(...[...row.cells[i].childNodes].map((child) => child.cloneNode(true)));
      list.append(name, value);
    });
    details.replaceChildren(title, list);
  }

  function toRow(first) {
    const row = rows[first];
    if (!row.hidden) box.scrollTop = row.offsetTop - box.clientHeight / 2;
  }

  function toNode(ordinal) {
    const seen = nodes.find(({ node, first, last }) => first <= ordinal && ordinal <= last && node.checkVisibility());
    if (!seen) return;
    const picture = seen.node.closest(".picture");
    const place = seen.node.getBoundingClientRect().top - picture.getBoundingClientRect().top;
    picture.scrollTop += place - picture.clientHeight / 2;
    hold(seen.node.ownerSVGElement.querySelectorAll(".node"), seen.node);
  }

  function choose(node) {
    const { first, last } = span(node);
    const isChosen = node.getAttribute("aria-pressed") === "true";
    hold(node.ownerSVGElement.querySelectorAll(".node"), node);
    if (isChosen) return show(0, -1);
    show(first, last);
    toRow(first);
  }

  const picks = rows.map((row) => row.querySelector(".pick"));
  const picture = graph.querySelector(".picture");
  picture.addEventListener("click", (event) => {
    const node = event.target.closest(".node");
    if (node) choose(node);
  });
  picture.addEventListener("keydown", (event) => {
    const node = event.target.closest(".node");
    if (!node) return;
    const own = [...node.ownerSVGElement.querySelectorAll(".node")];
    const at = own.indexOf(node);
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: own.length - 1 };
    if (event.key === "Enter" || event.key === " ") choose(node);
    else if (event.key === "Escape") show(0, -1);
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const sides = [...node.closest(".sides").querySelectorAll(".side")].filter((s) => s.checkVisibility());
      const other = sides[sides.indexOf(node.ownerSVGElement) + (event.key === "ArrowRight" ? 1 : -1)];
      if (other) move(other.querySelectorAll(".node")[at]);
    } else if (event.key in moves) {
      if (own[moves[event.key]]) move(own[moves[event.key]]);
    } else return;
    event.preventDefault();
  });

  function move(node) {
    hold(node.ownerSVGElement.querySelectorAll(".node"), node);
    node.focus();
    node.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  const body = graph.querySelector(".layers tbody");
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!row || String(getSelection())) return;
    const at = rows.indexOf(row);
    show(at, row.classList.contains("chosen") ? -1 : at);
    toNode(at);
  });
  body.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") return show(0, -1);
    if (!step) return;
    event.preventDefault();
    let at = rows.indexOf(event.target.closest("tr")) + step;
    while (rows[at] && rows[at].hidden) at += step;
    if (!rows[at]) return;
    hold(picks, picks[at]);
    picks[at].focus();
  });

  const search = graph.querySelector("input[type=search]");
  const actions = [...graph.querySelectorAll("input.action")];
  const count = graph.querySelector("output");
  function filter() {
    texts ??= rows.map((row) => row.textContent.toLowerCase());
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = new Set(actions.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !(wanted.has(row.dataset.action) && words.every((word) => texts[i].includes(word)));
      shown += !row.hidden;
    });
    count.textContent = `${shown} of ${rows.length} layers`;
    const first = rows.findIndex((row) => !row.hidden);
    if (first >= 0) hold(picks, picks[first]);
    dim();
  }
  function dim() {
    for (const { node, first: a, last: b } of nodes) {
      let isSeen = false;
      for (let i = a; i <= b && !isSeen; i++) isSeen = !rows[i].hidden;
      node.classList.toggle("dim", !isSeen);
    }
  }
  search.addEventListener("input", filter);
  for (const box of actions) box.addEventListener("change", filter);

  const fold = graph.querySelector(".fold");
  if (!fold) return;
  const pictures = [picture.querySelector(".sides"), null];
  fold.addEventListener("change", () => {
    // The whole picture may be long: it is made when it is asked for.
    pictures[1] ??= picture.querySelector("template").content.firstElementChild;
    pictures[Number(fold.checked)].replaceWith(pictures[Number(!fold.checked)]);
    nodes = [...graph.querySelectorAll(".node")].map(span);
    dim();
    const chosen = rows.flatMap((row, i) => (row.classList.contains("chosen") ? [i] : []));
    if (chosen.length) show(chosen[0], chosen.at(-1));
  });
}

for (const graph of document.querySelectorAll(".graph")) layersOf(graph);

const theme = document.querySelector(".theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
const name = () => (theme.textContent = isDark() ? "light" : "dark");
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  name();
});
dark.addEventListener("change", name);
name();
for (const element of document.querySelectorAll(".scripted")) element.hidden = false;
