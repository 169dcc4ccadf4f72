// For narrow pages: a line of a command breaks before an option, not behind its dashes, and a
// figure opens alone when it is tapped.
document.addEventListener("DOMContentLoaded", () => {
  for (const code of document.querySelectorAll(".md-typeset code")) {
    const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
    const texts = [];
    while (walker.nextNode()) texts.push(walker.currentNode);
    for (const text of texts) {
      const pieces = text.data.split(/((?<![\w-])--?[A-Za-z][\w.-]*)/);
      if (pieces.length === 1) continue;
      text.replaceWith(
        ...pieces.map((piece, i) => {
          if (i % 2 === 0) return piece;
          const option = document.createElement("span");
          option.className = "option";
          option.textContent = piece;
          return option;
        })
      );
    }
  }
  for (const image of document.querySelectorAll('.md-typeset img[src*="figures/"]')) {
    const link = document.createElement("a");
    link.href = image.src.replace("-dark.svg", ".svg"); // alone it lies on white
    link.title = image.alt;
    image.replaceWith(link);
    link.append(image);
  }
});
