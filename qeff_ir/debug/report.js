const find = document.getElementById("find"), rows = [...document.querySelectorAll("#origins tbody tr")];
const count = document.getElementById("count");
function search() {
  const words = find.value.toLowerCase().split(/\s+/);
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += row.hidden ? 0 : 1;
  }
  count.textContent = `${shown} of ${rows.length}`;
}
function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}
find.addEventListener("input", search);
addEventListener("hashchange", reveal);
search();
reveal();
