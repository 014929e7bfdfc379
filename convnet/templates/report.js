const button = document.getElementById("copy");
button.hidden = false;
button.addEventListener("click", async () => {
  const command = document.getElementById("command");
  getSelection().selectAllChildren(command);
  try {
    await navigator.clipboard.writeText(command.textContent);
  } catch {
    // Pages opened from a file may not have the clipboard API.
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});
