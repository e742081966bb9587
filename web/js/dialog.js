// The dialog with the charts of one node.

import { chart } from "./chart.js";

let shown = null; // { dialog, key }: one at a time

/** An HTML element with properties and children. */
export function make(name, properties = {}, ...children) {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
}

/** Charts of the reports of a node. `key` says which node, so that the dialog can follow a run that goes on. */
export function openCharts(key, title, reports) {
    shown?.dialog.close();
    const close = make("button", { type: "button", textContent: "×", title: "Close" });
    close.setAttribute("aria-label", "Close");
    const heading = make("h2", { id: "patchconv-dialog-title", textContent: title });
    const content = make("div");
    const dialog = make("dialog", { className: "patchconv-dialog" }, make("header", {}, heading, close), content);
    dialog.setAttribute("aria-labelledby", heading.id);
    close.addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    // The host has keys of its own (Delete, Ctrl+Enter), which are not meant while a dialog is open.
    dialog.addEventListener("keydown", (event) => event.stopPropagation());
    dialog.addEventListener("close", () => {
        if (shown?.dialog === dialog) shown = null;
        dialog.remove();
    });
    shown = { dialog, key, content };
    fill(reports);
    document.body.append(dialog);
    dialog.showModal();
}

/** Newer reports of a node, if it is the one that is shown. */
export function followCharts(key, reports) {
    if (shown?.key === key) fill(reports);
}

function fill(reports) {
    shown.content.replaceChildren(
        ...reports.map((report, number) => {
            const caption = make("figcaption", { textContent: report.line });
            if (!report.peak) return make("figure", {}, caption, make("p", { textContent: "Memory was not measured." }));
            return make("figure", {}, caption, chart(report, `patchconv-chart-${number}`));
        }),
        make("p", {
            textContent:
                "Memory is what was in use at once beyond the start of the run. What the same work needs without " +
                "Patch Conv is counted from its feature maps, without what its convolutions work in.",
        }),
    );
}
