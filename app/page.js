// Votes by key while the cursor is in no text field: left, right, T(ie), B(oth bad).
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, [contenteditable], [role=tab], [role=slider]");
  if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = { ArrowLeft: "left", ArrowRight: "right", t: "tie", b: "both_bad" }[event.key];
  const button = choice && document.getElementById(`vote-${choice}`);
  if (button && button.offsetParent) {
    event.preventDefault();
    button.click();
  }
});

// Messages reach their chatbot escaped (as_text in ui_parts.py), and it copies what it was given.
if (navigator.clipboard) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  const character = { "&lt;": "<", "&gt;": ">", "&amp;": "&" };
  navigator.clipboard.writeText = (text) => write(text.replace(/&(lt|gt|amp);/g, (entity) => character[entity]));
}
