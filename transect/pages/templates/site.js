const root = document.documentElement;
const kept = localStorage.getItem("theme");
if (kept) root.dataset.theme = kept;
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
});
const box = document.getElementById("search");
if (box) {
  const searched = JSON.parse(document.getElementById("searched").textContent);
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = new Set(searched.filter(one => words.every(word => one.words.includes(word))).map(one => one.file));
    for (const entry of document.querySelectorAll("[data-file]")) entry.hidden = !shown.has(entry.dataset.file);
    for (const group of document.querySelectorAll("[data-group]"))
      group.hidden = !group.querySelector("[data-file]:not([hidden])");
    document.getElementById("nothing").hidden = shown.size > 0;
  });
}
