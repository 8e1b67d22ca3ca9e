// Before anything is painted, so that a page that is dark does not flash.
try {
  const theme = localStorage.getItem("engineshed.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be closed to this page; the system's own theme stands.
}
