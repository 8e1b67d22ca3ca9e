// The page's two tabs, as https://www.w3.org/WAI/ARIA/apg/patterns/tabs/ describes them; the address says which is shown.

const tabs = () => [...document.querySelectorAll('[role="tab"]')];

/** Show the tab of that name. */
export function select(name, { focus = false } = {}) {
  for (const tab of tabs()) {
    const selected = tab.dataset.tab === name;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    const panel = document.getElementById(tab.getAttribute("aria-controls"));
    panel.hidden = !selected;
    if (selected && focus) tab.focus();
    panel.dispatchEvent(new CustomEvent("shown", { detail: selected }));
  }
  history.replaceState(null, "", name === tabs()[0].dataset.tab ? location.pathname : `#${name}`);
}

/** Connect the tabs, and show the one that the address names. */
export function connectTabs() {
  const all = tabs();
  for (const [place, tab] of all.entries()) {
    tab.addEventListener("click", () => select(tab.dataset.tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: all.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      select(all[(to + all.length) % all.length].dataset.tab, { focus: true });
    });
  }
  const named = () => all.find((tab) => `#${tab.dataset.tab}` === location.hash)?.dataset.tab ?? all[0].dataset.tab;
  addEventListener("hashchange", () => select(named()));
  select(named());
}
