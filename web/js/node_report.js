// What stands on a node: a button for each part that ran, or the text of Patch Conv Report.

import { spark } from "./chart.js";
import { make, openCharts } from "./dialog.js";

const NAME = "patchconv_report";
const ROW = 56, GAP = 4, MARGIN = 6; // pixels
const TEXT = [320, 72]; // of the node at least, and of the text

/** Show `content` (`reports` or `text`) on a node of the canvas, in place of what stood there. */
export function show(node, key, content) {
    const { reports, text } = content;
    const height = 2 * MARGIN + (reports ? reports.length * (ROW + GAP) - GAP : TEXT[1]);
    let widget = widgetOf(node);
    if (!widget || widget.patchConvHeight !== height) {
        hide(node);
        widget = add(node, height, reports ? 0 : TEXT[0]);
    }
    const element = widget.element;
    fill(element, reports ? reports.map((report) => row(element, node, key, report)) : [wordsOf(text)]);
    node.setDirtyCanvas?.(true, true);
}

/** Have `children` in `element`, those that are there already left in place: a button keeps its focus and its click. */
function fill(element, children) {
    for (const child of [...element.children]) if (!children.includes(child)) child.remove();
    children.forEach((child, i) => {
        if (element.children[i] !== child) element.insertBefore(child, element.children[i] ?? null);
    });
}

/** Take it off again; the node is as large as before. */
export function hide(node) {
    const widget = widgetOf(node);
    if (!widget) return;
    node.removeWidget(widget);
    node.setSize(less(node.size, widget.patchConvGrowth));
    node.setDirtyCanvas?.(true, true);
}

function widgetOf(node) {
    return node.widgets?.find((widget) => widget.name === NAME);
}

function less(size, growth) {
    return [size[0] - growth[0], size[1] - growth[1]];
}

function add(node, height, width) {
    const element = make("div", { className: "patchconv-report" });
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", "Patch Conv: what the last run took");
    const [wide, high] = node.size;
    const widget = node.addDOMWidget(NAME, NAME, element, {
        serialize: false, // not sent with the prompt
        getMinHeight: () => height,
        getMaxHeight: () => height,
        getHeight: () => height,
        margin: MARGIN,
    });
    widget.serialize = false; // nor saved
    widget.patchConvHeight = height;
    const size = [Math.max(wide, width), Math.max(high, node.computeSize()[1])];
    widget.patchConvGrowth = less(size, [wide, high]);
    node.setSize(size);
    if (!node.patchConvSaves) {
        // A workflow is saved with the size that the node has without us.
        node.patchConvSaves = true;
        const save = node.onSerialize;
        node.onSerialize = function (saved) {
            save?.call(this, saved);
            const growth = widgetOf(this)?.patchConvGrowth;
            if (growth) saved.size = less(saved.size, growth);
        };
    }
    return widget;
}

function row(element, node, key, report) {
    const { way, peak, eager_short: eager, time, alone } = report.words;
    const first = [peak, time].filter(Boolean).join(", ") || way;
    const lines = [
        first + report.ending,
        `${report.part.replace("VAE ", "")} ${way}`,
        alone ?? eager ?? "",
    ];
    const words = make("div", { className: "patchconv-words" });
    words.append(...lines.filter(Boolean).map((line) => make("span", { textContent: line })));
    const button = [...element.children].find((one) => one.dataset.part === report.part) ?? buttonOf(node, key, report.part);
    button.title = report.line;
    button.setAttribute("aria-label", `${report.line}. Open the chart of memory over time.`);
    button.replaceChildren(words, ...(report.peak ? [spark(report)] : []));
    return button;
}

function buttonOf(node, key, part) {
    const button = make("button", { type: "button", className: "patchconv-row" });
    button.dataset.part = part;
    button.setAttribute("aria-haspopup", "dialog");
    button.addEventListener("click", (event) => {
        event.stopPropagation();
        openCharts(key, node.title, node.patchConvReports());
    });
    return button;
}

function wordsOf(text) {
    const words = make("pre", { className: "patchconv-text", textContent: text, tabIndex: 0 });
    words.setAttribute("aria-label", "Report");
    return words;
}
